//! The CRI's image service.

use std::os::unix::fs::MetadataExt as _;
use std::time::{SystemTime, UNIX_EPOCH};

use coracle_image::{Credentials, Image as StoredImage, ImageConfig, Reference};
use coracle_proto::cri::image_service_server::ImageService;
use coracle_proto::cri::{self as v1, FilesystemUsage};
use serde_json::json;
use tonic::{Request, Response, Status, async_trait};

use super::{Shared, not_done};
use crate::status;

/// The image service.
pub(crate) struct Images(pub(crate) Shared);

type Answer<T> = Result<Response<T>, Status>;

#[async_trait]
impl ImageService for Images {
    type StreamImagesStream = tokio_stream::Empty<Result<v1::StreamImagesResponse, Status>>;

    async fn list_images(&self, request: Request<v1::ListImagesRequest>) -> Answer<v1::ListImagesResponse> {
        let wanted = request
            .into_inner()
            .filter
            .and_then(|f| f.image)
            .map(|i| i.image)
            .filter(|i| !i.is_empty());
        let images = match wanted {
            Some(name) => self.0.images.resolve(&name).into_iter().collect(),
            None => self.0.images.list(),
        };
        Ok(Response::new(v1::ListImagesResponse {
            images: images.iter().map(|image| convert(image)).collect(),
        }))
    }

    async fn stream_images(&self, _: Request<v1::StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        Err(not_done("StreamImages"))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Answer<v1::ImageStatusResponse> {
        let request = request.into_inner();
        let found = self.0.images.resolve(&name_of(request.image)?);
        let mut info = std::collections::HashMap::new();
        if let Some(image) = found.as_ref().filter(|_| request.verbose) {
            let document = json!({"imageSpec": image_spec(&image.config)});
            info.insert("info".to_owned(), document.to_string());
        }
        let image = found.map(|image| convert(&image));
        Ok(Response::new(v1::ImageStatusResponse {
            image,
            info: info.into_iter().collect(),
        }))
    }

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<v1::PullImageResponse> {
        // A client that gives up, or whose deadline passes, has the call dropped, and with it the pull.
        let request = request.into_inner();
        let name = name_of(request.image)?;
        let reference: Reference = name
            .parse()
            .map_err(|e| Status::invalid_argument(format!("image {name:?}: {}", status::chain(&e))))?;
        let credentials = credentials(request.auth.unwrap_or_default())?;
        let options = self.0.pulls.borrow().clone();
        let pulled = self.0.images.pull(&reference, credentials, &options).await;
        let image = pulled.map_err(|error| status::of_pull(&error))?;
        Ok(Response::new(v1::PullImageResponse {
            image_ref: image.id.to_string(),
        }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Answer<v1::RemoveImageResponse> {
        let name = name_of(request.into_inner().image)?;
        let (images, engine) = (self.0.images.clone(), self.0.engine.clone());
        // A client that hangs up must not leave it half-done.
        let removal =
            tokio::spawn(async move { images.remove(&name, |id| engine.is_image_in_use(id)).await });
        let removed = removal
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        removed.map_err(|error| status::of_image(&error))?;
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<v1::ImageFsInfoRequest>) -> Answer<v1::ImageFsInfoResponse> {
        let usage = self.0.images.usage();
        // Looked at for its existence: a kubelet resolves the path itself.
        std::fs::metadata(&self.0.root)
            .map(|m| m.dev())
            .map_err(|e| Status::unknown(e.to_string()))?;
        let used = FilesystemUsage {
            timestamp: nanoseconds(SystemTime::now()),
            fs_id: Some(v1::FilesystemIdentifier {
                mountpoint: self.0.root.display().to_string(),
            }),
            used_bytes: Some(v1::UInt64Value { value: usage.bytes }),
            inodes_used: Some(v1::UInt64Value { value: usage.inodes }),
        };
        let info = v1::ImageFsInfoResponse {
            image_filesystems: vec![used.clone()],
            container_filesystems: vec![used],
        };
        Ok(Response::new(info))
    }
}

fn name_of(image: Option<v1::ImageSpec>) -> Result<String, Status> {
    let name = image.map(|image| image.image).unwrap_or_default();
    if name.is_empty() {
        return Err(Status::invalid_argument("image.image: is empty"));
    }
    Ok(name)
}

fn convert(image: &StoredImage) -> v1::Image {
    let user = image.config.user.split(':').next().unwrap_or_default();
    let uid = user.parse::<u32>().ok();
    v1::Image {
        id: image.id.to_string(),
        repo_tags: image.tags.iter().map(ToString::to_string).collect(),
        repo_digests: image.digests.iter().map(ToString::to_string).collect(),
        size: image.size.max(1),
        uid: uid.map(|uid| v1::Int64Value { value: uid.into() }),
        username: if uid.is_none() {
            user.to_owned()
        } else {
            String::new()
        },
        spec: None,
        pinned: image.pinned,
    }
}

/// The configuration as the OCI image specification writes it: what tools look for in a verbose status.
fn image_spec(config: &ImageConfig) -> serde_json::Value {
    let set = |names: &[String]| -> serde_json::Map<String, serde_json::Value> {
        names.iter().map(|name| (name.clone(), json!({}))).collect()
    };
    json!({
        "created": config.created,
        "architecture": config.platform.architecture,
        "os": config.platform.os,
        "variant": config.platform.variant,
        "config": {
            "User": config.user,
            "ExposedPorts": set(&config.exposed_ports),
            "Env": config.env,
            "Entrypoint": config.entrypoint,
            "Cmd": config.cmd,
            "Volumes": set(&config.volumes),
            "WorkingDir": config.working_dir,
            "Labels": config.labels,
            "StopSignal": config.stop_signal,
        },
        "rootfs": {"type": "layers", "diff_ids": config.diff_ids},
    })
}

/// One of user and password, `auth` (both in base64), a refresh token or a bearer token.
fn credentials(auth: v1::AuthConfig) -> Result<Credentials, Status> {
    if !auth.registry_token.is_empty() {
        return Ok(Credentials::Bearer(auth.registry_token));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Credentials::Identity(auth.identity_token));
    }
    if !auth.username.is_empty() {
        return Ok(Credentials::Basic {
            username: auth.username,
            password: auth.password,
        });
    }
    if auth.auth.is_empty() {
        return Ok(Credentials::Anonymous);
    }
    let bad = || Status::invalid_argument("auth.auth: is not base64 of user:password");
    let text = String::from_utf8(decode_base64(&auth.auth).ok_or_else(bad)?).map_err(|_| bad())?;
    let (username, password) = text.split_once(':').ok_or_else(bad)?;
    let password = password.trim_end_matches('\0').to_owned();
    Ok(Credentials::Basic {
        username: username.to_owned(),
        password,
    })
}

/// Standard alphabet; padding may be missing.
#[allow(clippy::cast_possible_truncation, reason = "masked to eight bits")]
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut word, mut bits) = (0_u32, 0);
    for symbol in text.trim_end_matches('=').bytes() {
        let value = match symbol {
            b'A'..=b'Z' => symbol - b'A',
            b'a'..=b'z' => symbol - b'a' + 26,
            b'0'..=b'9' => symbol - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        word = (word << 6) | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            // The mask leaves eight bits.
            bytes.push(((word >> bits) & 0xff) as u8);
        }
    }
    Some(bytes)
}

fn nanoseconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_decoded() {
        for (text, expected) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("dXNlcjpwYSBzcw", "user:pa ss"),
        ] {
            assert_eq!(decode_base64(text).unwrap(), expected.as_bytes(), "{text}");
        }
        assert_eq!(decode_base64("a b"), None);
        assert_eq!(decode_base64("é"), None);
    }

    #[test]
    fn a_verbose_status_has_the_specification_s_names() {
        let config = ImageConfig {
            user: "www:33".into(),
            cmd: vec!["serve".into()],
            exposed_ports: vec!["80/tcp".into()],
            ..Default::default()
        };
        let spec = image_spec(&config);
        assert_eq!(spec["config"]["User"], "www:33");
        assert_eq!(spec["config"]["Cmd"], json!(["serve"]));
        assert_eq!(spec["config"]["ExposedPorts"], json!({"80/tcp": {}}));
        assert_eq!(spec["rootfs"]["diff_ids"], json!([]));
    }

    #[test]
    fn credentials_come_in_four_forms() {
        let basic = Credentials::Basic {
            username: "user".into(),
            password: "pa ss".into(),
        };
        let auth = v1::AuthConfig {
            auth: "dXNlcjpwYSBzcw".into(),
            ..Default::default()
        };
        assert!(credentials(auth).unwrap() == basic);
        let bad = v1::AuthConfig {
            auth: "%".into(),
            ..Default::default()
        };
        assert_eq!(credentials(bad).unwrap_err().code(), tonic::Code::InvalidArgument);
        assert!(credentials(v1::AuthConfig::default()).unwrap() == Credentials::Anonymous);
    }
}
