//! A CRI client over the daemon's socket, for tests and benchmarks that go step by step.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use coracle_proto::cri as v1;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// The generated clients.
pub type RuntimeClient = v1::runtime_service_client::RuntimeServiceClient<Channel>;
/// The generated clients.
pub type ImageClient = v1::image_service_client::ImageServiceClient<Channel>;
/// The daemon's own interface.
pub type AdminClient = coracle_proto::admin::admin_client::AdminClient<Channel>;

/// What kubelets send and take at most.
const MESSAGE_LIMIT_BYTES: usize = 16 << 20;

/// Blocking calls to one daemon.
pub struct Client {
    tokio: Runtime,
    channel: Channel,
}

impl Client {
    /// Connects to the socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?;
        let channel = tokio
            .block_on(endpoint.connect())
            .with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Self { tokio, channel })
    }

    /// The runtime service; clones share the connection.
    pub fn runtime(&self) -> RuntimeClient {
        RuntimeClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT_BYTES)
    }

    /// The image service.
    pub fn image(&self) -> ImageClient {
        ImageClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT_BYTES)
    }

    /// The admin service.
    pub fn admin(&self) -> AdminClient {
        AdminClient::new(self.channel.clone())
    }

    /// Waits for a call; gives the bare message.
    pub fn wait<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
        self.tokio.block_on(call).map(Response::into_inner)
    }

    /// Starts a call that goes on while the test does something else.
    pub fn spawn<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>> + Send + 'static,
    ) -> tokio::task::JoinHandle<Result<T, Status>> {
        self.tokio.spawn(async { call.await.map(Response::into_inner) })
    }

    /// Waits for what [`Client::spawn`] gave.
    pub fn join<T>(&self, handle: tokio::task::JoinHandle<Result<T, Status>>) -> Result<Result<T, Status>> {
        Ok(self.tokio.block_on(handle)?)
    }

    /// RunPodSandbox.
    pub fn run_pod(&self, config: &v1::PodSandboxConfig) -> Result<String, Status> {
        let mut client = self.runtime();
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        self.wait(client.run_pod_sandbox(request))
            .map(|r| r.pod_sandbox_id)
    }

    /// CreateContainer.
    pub fn create(
        &self,
        sandbox: &str,
        config: &v1::ContainerConfig,
        pod: &v1::PodSandboxConfig,
    ) -> Result<String, Status> {
        let mut client = self.runtime();
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.clone()),
        };
        self.wait(client.create_container(request))
            .map(|r| r.container_id)
    }

    /// StartContainer.
    pub fn start(&self, container: &str) -> Result<(), Status> {
        let mut client = self.runtime();
        let request = v1::StartContainerRequest {
            container_id: container.to_owned(),
        };
        self.wait(client.start_container(request)).map(drop)
    }

    /// ExecSync; gives standard output, standard error and the exit code.
    pub fn exec(
        &self,
        container: &str,
        command: &[&str],
        limit: Duration,
    ) -> Result<v1::ExecSyncResponse, Status> {
        let mut client = self.runtime();
        let request = v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        };
        self.wait(client.exec_sync(request))
    }

    /// StopContainer.
    pub fn stop(&self, container: &str, grace: Duration) -> Result<(), Status> {
        let mut client = self.runtime();
        let timeout = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        let request = v1::StopContainerRequest {
            container_id: container.to_owned(),
            timeout,
        };
        self.wait(client.stop_container(request)).map(drop)
    }

    /// RemoveContainer.
    pub fn remove(&self, container: &str) -> Result<(), Status> {
        let mut client = self.runtime();
        let request = v1::RemoveContainerRequest {
            container_id: container.to_owned(),
        };
        self.wait(client.remove_container(request)).map(drop)
    }

    /// StopPodSandbox and RemovePodSandbox.
    pub fn discard_pod(&self, sandbox: &str) -> Result<(), Status> {
        let mut client = self.runtime();
        let stop = v1::StopPodSandboxRequest {
            pod_sandbox_id: sandbox.to_owned(),
        };
        self.wait(client.stop_pod_sandbox(stop))?;
        let remove = v1::RemovePodSandboxRequest {
            pod_sandbox_id: sandbox.to_owned(),
        };
        self.wait(client.remove_pod_sandbox(remove)).map(drop)
    }

    /// ContainerStatus.
    pub fn container_status(&self, container: &str) -> Result<v1::ContainerStatus, Status> {
        let mut client = self.runtime();
        let request = v1::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        self.wait(client.container_status(request))?
            .status
            .ok_or_else(|| Status::internal("no status in the answer"))
    }

    /// PodSandboxStatus.
    pub fn pod_status(&self, sandbox: &str) -> Result<v1::PodSandboxStatus, Status> {
        let mut client = self.runtime();
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: sandbox.to_owned(),
            verbose: false,
        };
        self.wait(client.pod_sandbox_status(request))?
            .status
            .ok_or_else(|| Status::internal("no status in the answer"))
    }

    /// ListPodSandbox without a filter.
    pub fn pods(&self) -> Result<Vec<v1::PodSandbox>, Status> {
        let mut client = self.runtime();
        self.wait(client.list_pod_sandbox(v1::ListPodSandboxRequest::default()))
            .map(|r| r.items)
    }

    /// ListContainers without a filter.
    pub fn containers(&self) -> Result<Vec<v1::Container>, Status> {
        let mut client = self.runtime();
        self.wait(client.list_containers(v1::ListContainersRequest::default()))
            .map(|r| r.containers)
    }

    /// ListImages without a filter.
    pub fn images(&self) -> Result<Vec<v1::Image>, Status> {
        let mut client = self.image();
        self.wait(client.list_images(v1::ListImagesRequest::default()))
            .map(|r| r.images)
    }

    /// PullImage without credentials; gives the image's id.
    pub fn pull(&self, reference: &str) -> Result<String, Status> {
        let mut client = self.image();
        let image = v1::ImageSpec {
            image: reference.to_owned(),
            ..Default::default()
        };
        let request = v1::PullImageRequest {
            image: Some(image),
            ..Default::default()
        };
        self.wait(client.pull_image(request)).map(|r| r.image_ref)
    }
}

/// A pod's request, with its own directory for logs and nothing unusual.
pub fn pod_config(name: &str, logs: &Path) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: logs.display().to_string(),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                // What a kubelet sends for a pod that does not share processes: CONTAINER.
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container's request that runs `command`.
pub fn container_config(name: &str, image: &str, command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(v1::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        }),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}
