//! `coracle.admin.v1`: the people's commands.

use coracle_proto::admin::admin_server::Admin;
use coracle_proto::admin::import_image_request::Part;
use coracle_proto::admin::{ImportImageRequest, ImportImageResponse, ImportedImage};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::Shared;
use crate::status;

/// The admin service.
pub(crate) struct AdminService(pub(crate) Shared);

#[async_trait]
impl Admin for AdminService {
    async fn import_image(
        &self,
        request: Request<Streaming<ImportImageRequest>>,
    ) -> Result<Response<ImportImageResponse>, Status> {
        let mut parts = request.into_inner();
        let Some(ImportImageRequest {
            part: Some(Part::Header(header)),
        }) = parts.message().await?
        else {
            return Err(Status::invalid_argument("the first message must be the header"));
        };
        let name = match header.name.as_str() {
            "" => None,
            text => Some(
                text.parse()
                    .map_err(|e| Status::invalid_argument(format!("name {text:?}: {}", status::chain(&e))))?,
            ),
        };
        let (archive, sink) = coracle_kernel::fd::pipe().map_err(|e| Status::unknown(e.to_string()))?;
        let mut sink = pipe::Sender::from_owned_fd(sink)?;
        let feed = async move {
            while let Some(message) = parts.message().await? {
                let Some(Part::Chunk(chunk)) = message.part else {
                    return Err(Status::invalid_argument("a second header"));
                };
                // A reader that has gone has an error to tell.
                if sink.write_all(&chunk).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        let import = self.0.images.import(archive, name);
        let (fed, imported) = tokio::join!(feed, import);
        fed?;
        let images = imported.map_err(|error| Status::unknown(status::chain(&error)))?;
        let images = images.iter().map(|image| ImportedImage {
            id: image.id.to_string(),
            names: image.tags.iter().map(ToString::to_string).collect(),
        });
        Ok(Response::new(ImportImageResponse {
            images: images.collect(),
        }))
    }
}
