//! Bytes that are almost a request or almost an image, the same each time: whatever comes back, the daemon is there
//! afterwards, nothing half-made is left, and nothing panicked.

use anyhow::{Result, ensure};
use coracle_integration::image::ImageSpec;
use coracle_integration::{Node, Options, leaks, request};
use coracle_proto::cri::{
    ContainerFilter, ContainerStatusRequest, ExecSyncRequest, ImageSpec as ImageName, ImageStatusRequest,
    ListContainersRequest, ListPodSandboxRequest, PodSandboxFilter, PullImageRequest, RemoveImageRequest,
    StopContainerRequest, StopPodSandboxRequest, UpdateRuntimeConfigRequest,
};
use prost::Message as _;
use prost::bytes::{Buf as _, BufMut as _};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;

crate::tests![requests_to_every_method, pods, containers, archives];

/// How many of each: ten times as many where time is no matter.
fn rounds(usual: usize) -> usize {
    if std::env::var_os("CORACLE_LONG").is_some() {
        usual * 10
    } else {
        usual
    }
}

/// xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap_or(0) % limit.max(1)
    }

    /// One to three changes: bytes replaced, flipped, cut off, doubled. Mostly one: some are to get through.
    fn mutate(&mut self, whole: &[u8]) -> Vec<u8> {
        let mut bytes = whole.to_vec();
        let changes = [1, 1, 1, 2, 3][self.below(5)];
        for _ in 0..changes {
            let at = self.below(bytes.len());
            if bytes.is_empty() {
                bytes.push(0);
            }
            match self.below(8) {
                0 => bytes.truncate(at.max(1)),
                1 => bytes.extend_from_within(at..),
                2 | 3 => bytes[at] ^= 1 << self.below(8),
                _ => bytes[at] = u8::try_from(self.below(256)).unwrap_or(0),
            }
        }
        bytes
    }
}

/// Messages as they are: the daemon decodes what no client would encode.
#[derive(Clone, Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; from.remaining()];
        from.copy_to_slice(&mut bytes);
        Ok(Some(bytes))
    }
}

/// Sends a message to `Service/Method` of the CRI.
async fn send(node: &Node, method: &'static str, message: Vec<u8>) -> Result<Result<Vec<u8>, Status>> {
    let mut client = tonic::client::Grpc::new(node.channel()).max_decoding_message_size(16 << 20);
    client.ready().await?;
    let answer = client
        .unary(
            tonic::Request::new(message),
            PathAndQuery::from_static(method),
            Raw,
        )
        .await;
    Ok(answer.map(tonic::Response::into_inner))
}

/// The daemon is as it was: it did not panic, and the files are those of `files`.
fn unharmed(node: &Node, files: &leaks::Names) -> Result<()> {
    ensure!(
        !node.log().contains("panicked"),
        "something panicked:\n{}",
        node.log()
    );
    let left = leaks::pod_files(&node.dir);
    ensure!(left == *files, "{left:?} instead of {files:?}");
    Ok(())
}

async fn requests_to_every_method() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("bytes", &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node
        .run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    let files = leaks::pod_files(&node.dir);
    let image = || {
        Some(ImageName {
            image: "127.0.0.1:1/a/b:c".into(),
            ..Default::default()
        })
    };
    let other = "f".repeat(64);
    let messages: Vec<(&'static str, Vec<u8>)> = vec![
        (
            "/runtime.v1.RuntimeService/ExecSync",
            ExecSyncRequest {
                container_id: id.clone(),
                cmd: vec!["echo".into(), "one".into()],
                timeout: 3,
            }
            .encode_to_vec(),
        ),
        (
            "/runtime.v1.RuntimeService/ContainerStatus",
            ContainerStatusRequest {
                container_id: id.clone(),
                verbose: true,
            }
            .encode_to_vec(),
        ),
        (
            "/runtime.v1.RuntimeService/ListContainers",
            ListContainersRequest {
                filter: Some(ContainerFilter {
                    id: id.clone(),
                    pod_sandbox_id: pod.clone(),
                    label_selector: [("container".to_owned(), "main".to_owned())].into(),
                    ..Default::default()
                }),
            }
            .encode_to_vec(),
        ),
        (
            "/runtime.v1.RuntimeService/ListPodSandbox",
            ListPodSandboxRequest {
                filter: Some(PodSandboxFilter {
                    id: pod.clone(),
                    ..Default::default()
                }),
            }
            .encode_to_vec(),
        ),
        (
            "/runtime.v1.RuntimeService/StopContainer",
            StopContainerRequest {
                container_id: other.clone(),
                timeout: 1,
            }
            .encode_to_vec(),
        ),
        (
            "/runtime.v1.RuntimeService/StopPodSandbox",
            StopPodSandboxRequest {
                pod_sandbox_id: other,
            }
            .encode_to_vec(),
        ),
        (
            "/runtime.v1.RuntimeService/UpdateRuntimeConfig",
            UpdateRuntimeConfigRequest::default().encode_to_vec(),
        ),
        (
            "/runtime.v1.ImageService/ImageStatus",
            ImageStatusRequest {
                image: image(),
                verbose: true,
            }
            .encode_to_vec(),
        ),
        (
            "/runtime.v1.ImageService/RemoveImage",
            RemoveImageRequest { image: image() }.encode_to_vec(),
        ),
        (
            "/runtime.v1.ImageService/PullImage",
            PullImageRequest {
                image: image(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
    ];
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut refused = 0;
    for (method, whole) in messages {
        // A pull starts three processes: fewer of them.
        let rounds = rounds(if method.ends_with("PullImage") { 10 } else { 40 });
        for _ in 0..rounds {
            let outcome = send(&node, method, random.mutate(&whole)).await?;
            if let Err(error) = outcome {
                ensure!(!error.message().is_empty(), "{method}: no text: {error:?}");
                refused += 1;
            }
        }
    }
    ensure!(refused > 50, "only {refused} were refused");
    // They were meant for another container, or for none.
    ensure!(
        node.exec(&id, &["true"], 10).await?.exit_code == 0,
        "the container takes no exec any more"
    );
    unharmed(&node, &files)?;
    node.finish().await
}

async fn pods() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let mut config = request::pod("bytes", &node.logs);
    // Another one each time, and the changes would be too.
    config.log_directory.clear();
    let whole = request::run(&config).encode_to_vec();
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let (mut taken, mut refused, mut last) = (0, 0, String::new());
    for _ in 0..rounds(120) {
        let method = "/runtime.v1.RuntimeService/RunPodSandbox";
        match send(&node, method, random.mutate(&whole)).await? {
            Ok(_) => taken += 1,
            Err(error) => {
                ensure!(!error.message().is_empty(), "no text: {error:?}");
                refused += 1;
                last = error.to_string();
            }
        }
        for pod in node.pod_ids().await? {
            node.remove_pod(&pod).await?;
        }
    }
    println!("    {taken} taken, {refused} refused");
    ensure!(
        taken > 10 && refused > 10,
        "{taken} taken, {refused} refused, the last one: {last}"
    );
    unharmed(&node, &leaks::Names::new())?;
    node.finish().await
}

async fn containers() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("bytes", &node.logs);
    let pod = node.run_pod(&config).await?;
    let files = leaks::pod_files(&node.dir);
    std::fs::create_dir_all(std::path::Path::new(&config.log_directory).join("main"))?;
    // The container's config alone: ids and paths are others each time, and the changes would be too.
    let whole = request::container("main", "true").encode_to_vec();
    let request = |changed: &[u8]| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (key, field) in [
            (0x0a, pod.as_bytes()),
            (0x12, changed),
            (0x1a, &config.encode_to_vec()),
        ] {
            bytes.push(key);
            prost::encode_length_delimiter(field.len(), &mut bytes)?;
            bytes.extend_from_slice(field);
        }
        Ok(bytes)
    };
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut taken, mut refused, mut last) = (0, 0, String::new());
    for _ in 0..rounds(200) {
        let method = "/runtime.v1.RuntimeService/CreateContainer";
        match send(&node, method, request(&random.mutate(&whole))?).await? {
            Ok(_) => taken += 1,
            Err(error) => {
                ensure!(!error.message().is_empty(), "no text: {error:?}");
                refused += 1;
                last = error.to_string();
            }
        }
        for id in node.container_ids().await? {
            // What was taken can be started, or says why not.
            let _ = node.start_container(&id).await;
            node.remove_container(&id).await?;
        }
    }
    println!("    {taken} taken, {refused} refused");
    ensure!(
        taken > 10 && refused > 10,
        "{taken} taken, {refused} refused, the last one: {last}"
    );
    unharmed(&node, &files)?;
    node.run_container(&pod, &request::container("after", "sleep 1000"), &config)
        .await?;
    node.finish().await
}

async fn archives() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let whole = ImageSpec::busybox(request::BUSYBOX).archive()?;
    let layers = || -> Result<usize> { Ok(std::fs::read_dir(node.root().join("layers"))?.count()) };
    let before = layers()?;
    let mut random = Random(0x0dd0_beef_cafe_f00d);
    let mut refused = 0;
    for round in 0..rounds(25) {
        // Ends early, or is changed where the documents are and where the layer is.
        let bytes = match round % 3 {
            0 => whole[..random.below(whole.len())].to_vec(),
            1 => random.mutate(&whole),
            _ => {
                let mut bytes = whole.clone();
                for _ in 0..20 {
                    let at = random.below(bytes.len());
                    bytes[at] ^= 1 << random.below(8);
                }
                bytes
            }
        };
        match node.import_archive("", &bytes).await {
            Ok(ids) => {
                // A change that meets padding alone is none.
                for image in ids {
                    let request = RemoveImageRequest {
                        image: Some(ImageName {
                            image,
                            ..Default::default()
                        }),
                    };
                    node.image().remove_image(request).await?;
                }
            }
            Err(error) => {
                ensure!(!error.message().is_empty(), "no text: {error:?}");
                refused += 1;
            }
        }
        ensure!(node.images().await?.is_empty(), "half an image is listed");
    }
    ensure!(refused > 10, "only {refused} were refused");
    crate::support::eventually(async || {
        let now = layers()?;
        ensure!(now == before, "{now} layers, {before} before");
        unharmed(&node, &leaks::Names::new())
    })
    .await?;
    node.import(&ImageSpec::busybox(request::BUSYBOX)).await?;
    node.finish().await
}
