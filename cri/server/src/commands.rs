//! The people's commands: they talk to a running daemon over its socket.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use coracle_proto::admin::admin_client::AdminClient;
use coracle_proto::admin::import_image_request::Part;
use coracle_proto::admin::{ImportImageHeader, ImportImageRequest};
use coracle_proto::cri as v1;
use coracle_proto::cri::image_service_client::ImageServiceClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::args::{Image, Target};

const CHUNK_BYTES: usize = 1 << 20;

/// Runs one `image` command.
pub(crate) fn image(command: Image) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match command {
            Image::Import {
                target,
                name,
                archive,
            } => import(&target, name.unwrap_or_default(), &archive).await,
            Image::Pull { target, reference } => pull(&target, reference).await,
            Image::Ls { target } => list(&target).await,
            Image::Rm { target, reference } => remove(&target, reference).await,
        }
    })
}

async fn connect(target: &Target) -> Result<Channel> {
    let endpoint = Endpoint::try_from(format!("unix://{}", target.socket.display()))?;
    endpoint
        .connect()
        .await
        .with_context(|| format!("connect to {}: is coracled running?", target.socket.display()))
}

async fn import(target: &Target, name: String, archive: &Path) -> Result<()> {
    let mut client = AdminClient::new(connect(target).await?);
    let mut source: Box<dyn Read + Send> = match archive.to_str() {
        Some("-") => Box::new(std::io::stdin()),
        _ => Box::new(std::fs::File::open(archive).with_context(|| format!("open {}", archive.display()))?),
    };
    let (sender, parts) = mpsc::channel(2);
    let reading = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
        let mut part = Part::Header(ImportImageHeader { name });
        // A daemon that has stopped listening has its reason to tell.
        while sender
            .blocking_send(ImportImageRequest { part: Some(part) })
            .is_ok()
        {
            let mut chunk = Vec::new();
            source.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
            if chunk.is_empty() {
                break;
            }
            part = Part::Chunk(chunk.into());
        }
        Ok(())
    });
    let answer = client.import_image(ReceiverStream::new(parts)).await;
    reading
        .await?
        .with_context(|| format!("read {}", archive.display()))?;
    for image in answer.map_err(words)?.into_inner().images {
        crate::answer(format_args!("{} {}", image.id, image.names.join(" ")))?;
    }
    Ok(())
}

async fn pull(target: &Target, reference: String) -> Result<()> {
    let mut client = ImageServiceClient::new(connect(target).await?);
    let image = Some(v1::ImageSpec {
        image: reference,
        ..Default::default()
    });
    let answer = client
        .pull_image(v1::PullImageRequest {
            image,
            ..Default::default()
        })
        .await
        .map_err(words)?;
    crate::answer(format_args!("{}", answer.into_inner().image_ref))?;
    Ok(())
}

async fn list(target: &Target) -> Result<()> {
    let mut client = ImageServiceClient::new(connect(target).await?);
    let answer = client
        .list_images(v1::ListImagesRequest::default())
        .await
        .map_err(words)?;
    for image in answer.into_inner().images {
        let names = if image.repo_tags.is_empty() {
            image.repo_digests
        } else {
            image.repo_tags
        };
        crate::answer(format_args!("{}\t{}\t{}", image.id, image.size, names.join(" ")))?;
    }
    Ok(())
}

async fn remove(target: &Target, reference: String) -> Result<()> {
    let mut client = ImageServiceClient::new(connect(target).await?);
    let image = Some(v1::ImageSpec {
        image: reference,
        ..Default::default()
    });
    client
        .remove_image(v1::RemoveImageRequest { image })
        .await
        .map_err(words)?;
    Ok(())
}

/// The daemon's own words, without the wrapping of gRPC.
#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn words(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}
