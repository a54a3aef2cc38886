//! CRI clients over the daemon's socket: `Calls` for async tests, `Client` for tests and benchmarks that go step by step.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use coracle_proto::admin::{ImportImageHeader, ImportImageRequest, import_image_request::Part};
use coracle_proto::cri as v1;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::image::ImageSpec;
use crate::request;

/// The generated clients.
pub type RuntimeClient = v1::runtime_service_client::RuntimeServiceClient<Channel>;
/// The generated clients.
pub type ImageClient = v1::image_service_client::ImageServiceClient<Channel>;
/// The daemon's own interface.
pub type AdminClient = coracle_proto::admin::admin_client::AdminClient<Channel>;

/// What kubelets send and take at most.
const MESSAGE_LIMIT_BYTES: usize = 16 << 20;

/// Size of the parts in which an archive is sent.
const CHUNK_BYTES: usize = 256 << 10;

/// Calls to one daemon; clones share the connection.
#[derive(Clone, Debug)]
pub struct Calls {
    channel: Channel,
}

/// Blocking calls to one daemon.
pub struct Client {
    tokio: Runtime,
    calls: Calls,
}

impl Calls {
    /// Connects to the socket.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?;
        let channel = endpoint
            .connect()
            .await
            .with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Self { channel })
    }

    /// The connection itself.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The runtime service.
    #[must_use]
    pub fn runtime(&self) -> RuntimeClient {
        RuntimeClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT_BYTES)
    }

    /// The image service.
    #[must_use]
    pub fn image(&self) -> ImageClient {
        ImageClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT_BYTES)
    }

    /// The admin service.
    #[must_use]
    pub fn admin(&self) -> AdminClient {
        AdminClient::new(self.channel.clone())
    }

    /// Imports an image; its id.
    pub async fn import(&self, image: &ImageSpec) -> Result<String> {
        let images = self.import_archive(&image.name, &image.archive()?).await?;
        images.into_iter().next().context("the archive held no image")
    }

    /// Imports an archive under a name; the ids of what it held.
    pub async fn import_archive(&self, name: &str, archive: &[u8]) -> Result<Vec<String>, Status> {
        let header = Part::Header(ImportImageHeader {
            name: name.to_owned(),
        });
        let chunks = archive
            .chunks(CHUNK_BYTES)
            .map(|chunk| Part::Chunk(chunk.to_vec().into()));
        let parts: Vec<_> = std::iter::once(header)
            .chain(chunks)
            .map(|part| ImportImageRequest { part: Some(part) })
            .collect();
        let answer = self.admin().import_image(tokio_stream::iter(parts)).await?;
        let images = answer.into_inner().images;
        Ok(images.into_iter().map(|image| image.id).collect())
    }

    /// RunPodSandbox; the log directory is made before, as a kubelet does.
    pub async fn run_pod(&self, config: &v1::PodSandboxConfig) -> Result<String, Status> {
        std::fs::create_dir_all(&config.log_directory)?;
        let answer = self.runtime().run_pod_sandbox(request::run(config)).await?;
        Ok(answer.into_inner().pod_sandbox_id)
    }

    /// CreateContainer; the directory of its log is made before, as a kubelet does.
    pub async fn create(
        &self,
        pod: &str,
        config: &v1::ContainerConfig,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<String, Status> {
        if let Some(dir) = Path::new(&config.log_path).parent() {
            std::fs::create_dir_all(Path::new(&sandbox.log_directory).join(dir))?;
        }
        let request = request::create(pod, config, sandbox);
        let answer = self.runtime().create_container(request).await?;
        Ok(answer.into_inner().container_id)
    }

    /// StartContainer.
    pub async fn start_container(&self, id: &str) -> Result<(), Status> {
        let request = v1::StartContainerRequest {
            container_id: id.into(),
        };
        self.runtime().start_container(request).await.map(drop)
    }

    /// CreateContainer and StartContainer.
    pub async fn run_container(
        &self,
        pod: &str,
        config: &v1::ContainerConfig,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<String, Status> {
        let id = self.create(pod, config, sandbox).await?;
        self.start_container(&id).await?;
        Ok(id)
    }

    /// StopContainer.
    pub async fn stop_container(&self, id: &str, seconds: i64) -> Result<(), Status> {
        let request = v1::StopContainerRequest {
            container_id: id.into(),
            timeout: seconds,
        };
        self.runtime().stop_container(request).await.map(drop)
    }

    /// RemoveContainer.
    pub async fn remove_container(&self, id: &str) -> Result<(), Status> {
        let request = v1::RemoveContainerRequest {
            container_id: id.into(),
        };
        self.runtime().remove_container(request).await.map(drop)
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&self, id: &str) -> Result<(), Status> {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        self.runtime().stop_pod_sandbox(request).await.map(drop)
    }

    /// RemovePodSandbox.
    pub async fn remove_pod(&self, id: &str) -> Result<(), Status> {
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        self.runtime().remove_pod_sandbox(request).await.map(drop)
    }

    /// PodSandboxStatus.
    pub async fn pod_status(&self, id: &str) -> Result<v1::PodSandboxStatus, Status> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: id.into(),
            verbose: false,
        };
        let answer = self.runtime().pod_sandbox_status(request).await?.into_inner();
        answer
            .status
            .ok_or_else(|| Status::internal("no status in the answer"))
    }

    /// ContainerStatus.
    pub async fn status(&self, id: &str) -> Result<v1::ContainerStatus, Status> {
        let request = v1::ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let answer = self.runtime().container_status(request).await?.into_inner();
        answer
            .status
            .ok_or_else(|| Status::internal("no status in the answer"))
    }

    /// ExecSync.
    pub async fn exec(
        &self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<v1::ExecSyncResponse, Status> {
        let request = v1::ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout,
        };
        self.runtime().exec_sync(request).await.map(Response::into_inner)
    }

    /// ListPodSandbox without a filter.
    pub async fn pods(&self) -> Result<Vec<v1::PodSandbox>, Status> {
        let request = v1::ListPodSandboxRequest::default();
        Ok(self.runtime().list_pod_sandbox(request).await?.into_inner().items)
    }

    /// Ids of all sandboxes.
    pub async fn pod_ids(&self) -> Result<Vec<String>, Status> {
        Ok(self.pods().await?.into_iter().map(|pod| pod.id).collect())
    }

    /// ListContainers without a filter.
    pub async fn containers(&self) -> Result<Vec<v1::Container>, Status> {
        let request = v1::ListContainersRequest::default();
        let answer = self.runtime().list_containers(request).await?;
        Ok(answer.into_inner().containers)
    }

    /// Ids of all containers.
    pub async fn container_ids(&self) -> Result<Vec<String>, Status> {
        let all = self.containers().await?;
        Ok(all.into_iter().map(|container| container.id).collect())
    }

    /// ListImages without a filter.
    pub async fn images(&self) -> Result<Vec<v1::Image>, Status> {
        let request = v1::ListImagesRequest::default();
        Ok(self.image().list_images(request).await?.into_inner().images)
    }

    /// PullImage without credentials; gives the image's id.
    pub async fn pull(&self, reference: &str) -> Result<String, Status> {
        let request = v1::PullImageRequest {
            image: Some(v1::ImageSpec {
                image: reference.to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(self.image().pull_image(request).await?.into_inner().image_ref)
    }
}

impl Client {
    /// Connects to the socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let calls = tokio.block_on(Calls::connect(socket))?;
        Ok(Self { tokio, calls })
    }

    /// RunPodSandbox.
    pub fn run_pod(&self, config: &v1::PodSandboxConfig) -> Result<String, Status> {
        self.wait(self.calls.run_pod(config))
    }

    /// CreateContainer.
    pub fn create(
        &self,
        sandbox: &str,
        config: &v1::ContainerConfig,
        pod: &v1::PodSandboxConfig,
    ) -> Result<String, Status> {
        self.wait(self.calls.create(sandbox, config, pod))
    }

    /// StartContainer.
    pub fn start(&self, container: &str) -> Result<(), Status> {
        self.wait(self.calls.start_container(container))
    }

    /// ExecSync; gives standard output, standard error and the exit code.
    pub fn exec(
        &self,
        container: &str,
        command: &[&str],
        limit: Duration,
    ) -> Result<v1::ExecSyncResponse, Status> {
        self.wait(self.calls.exec(container, command, seconds(limit)))
    }

    /// The URL of a PortForward.
    pub fn port_forward(&self, sandbox: &str) -> Result<String, Status> {
        let request = v1::PortForwardRequest {
            pod_sandbox_id: sandbox.to_owned(),
            port: Vec::new(),
        };
        let answer = self.wait(async { self.calls.runtime().port_forward(request).await })?;
        Ok(answer.into_inner().url)
    }

    /// StopContainer.
    pub fn stop(&self, container: &str, grace: Duration) -> Result<(), Status> {
        self.wait(self.calls.stop_container(container, seconds(grace)))
    }

    /// StopPodSandbox and RemovePodSandbox.
    pub fn discard_pod(&self, sandbox: &str) -> Result<(), Status> {
        self.wait(self.calls.stop_pod(sandbox))?;
        self.wait(self.calls.remove_pod(sandbox))
    }

    /// PodSandboxStatus.
    pub fn pod_status(&self, sandbox: &str) -> Result<v1::PodSandboxStatus, Status> {
        self.wait(self.calls.pod_status(sandbox))
    }

    /// ListPodSandbox without a filter.
    pub fn pods(&self) -> Result<Vec<v1::PodSandbox>, Status> {
        self.wait(self.calls.pods())
    }

    /// ListContainers without a filter.
    pub fn containers(&self) -> Result<Vec<v1::Container>, Status> {
        self.wait(self.calls.containers())
    }

    /// ListImages without a filter.
    pub fn images(&self) -> Result<Vec<v1::Image>, Status> {
        self.wait(self.calls.images())
    }

    /// PullImage without credentials; gives the image's id.
    pub fn pull(&self, reference: &str) -> Result<String, Status> {
        self.wait(self.calls.pull(reference))
    }

    fn wait<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        self.tokio.block_on(call)
    }
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}
