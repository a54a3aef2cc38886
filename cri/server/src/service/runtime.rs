//! The CRI's runtime service.

use coracle_proto::cri::runtime_service_server::RuntimeService;
use coracle_proto::cri::{self as v1, RuntimeCondition, RuntimeHandler, RuntimeHandlerFeatures};
use coracle_stream::{Refused, StreamRequest};
use prost::Message as _;
use tokio_stream::Empty;
use tonic::{Request, Response, Status, async_trait};

use super::{Shared, not_done};
use crate::status::{chain, of_engine};

/// The runtime service.
pub(crate) struct Runtime(pub(crate) Shared);

type Answer<T> = Result<Response<T>, Status>;

/// The prefix of container ids in pod statuses: it never changes.
const RUNTIME_NAME: &str = "coracle";

#[async_trait]
impl RuntimeService for Runtime {
    type StreamPodSandboxesStream = Empty<Result<v1::StreamPodSandboxesResponse, Status>>;
    type StreamContainersStream = Empty<Result<v1::StreamContainersResponse, Status>>;
    type StreamContainerStatsStream = Empty<Result<v1::StreamContainerStatsResponse, Status>>;
    type StreamPodSandboxStatsStream = Empty<Result<v1::StreamPodSandboxStatsResponse, Status>>;
    type StreamPodSandboxMetricsStream = Empty<Result<v1::StreamPodSandboxMetricsResponse, Status>>;
    type GetContainerEventsStream = Empty<Result<v1::ContainerEventResponse, Status>>;

    async fn version(&self, _: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        Ok(Response::new(v1::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: RUNTIME_NAME.into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        // It asks the kernel for sysctls and rules.
        let network = self.0.network.clone();
        let network = tokio::task::spawn_blocking(move || network.status()).await;
        let network = network.map_err(|error| Status::internal(chain(&error)))?;
        let conditions = vec![
            condition("RuntimeReady", None),
            condition(
                "NetworkReady",
                network
                    .not_ready
                    .as_deref()
                    .map(|why| ("NetworkPluginNotReady", why)),
            ),
        ];
        let mut info = std::collections::HashMap::new();
        if request.into_inner().verbose {
            let findings: Vec<_> = network
                .findings
                .iter()
                .map(|f| format!("{}: {}", f.what, f.cure))
                .collect();
            let config = serde_json::json!({
                "rootDir": self.0.root,
                "network": {"mode": self.0.network.mode(), "findings": findings},
            });
            info.insert("config".to_owned(), config.to_string());
        }
        let handler = RuntimeHandler {
            name: String::new(),
            features: Some(RuntimeHandlerFeatures {
                recursive_read_only_mounts: true,
                user_namespaces: false,
            }),
        };
        Ok(Response::new(v1::StatusResponse {
            status: Some(v1::RuntimeStatus { conditions }),
            info: info.into_iter().collect(),
            runtime_handlers: vec![
                RuntimeHandler {
                    name: RUNTIME_NAME.into(),
                    ..handler.clone()
                },
                handler,
            ],
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..Default::default()
            }),
        }))
    }

    async fn runtime_config(
        &self,
        _: Request<v1::RuntimeConfigRequest>,
    ) -> Answer<v1::RuntimeConfigResponse> {
        let linux = v1::LinuxRuntimeConfiguration {
            cgroup_driver: v1::CgroupDriver::Cgroupfs.into(),
        };
        Ok(Response::new(v1::RuntimeConfigResponse { linux: Some(linux) }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        let network = request
            .into_inner()
            .runtime_config
            .and_then(|config| config.network_config);
        let cidr = network.map(|network| network.pod_cidr).unwrap_or_default();
        if !cidr.is_empty() {
            tracing::info!(
                cidr,
                mode = self.0.network.mode(),
                "the node's pod addresses; the built-in bridge has its own"
            );
            let network = self.0.network.clone();
            let set = tokio::task::spawn_blocking(move || network.set_pod_cidr(&cidr)).await;
            set.map_err(|error| Status::internal(chain(&error)))?
                .map_err(|error| Status::internal(chain(&error)))?;
        }
        Ok(Response::new(v1::UpdateRuntimeConfigResponse {}))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Answer<v1::RunPodSandboxResponse> {
        let request = request.into_inner();
        let raw = request.encode_to_vec();
        let pod_sandbox_id = self
            .0
            .engine
            .run_pod_sandbox(request, raw)
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Answer<v1::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.0
            .engine
            .stop_pod_sandbox(&id)
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Answer<v1::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.0
            .engine
            .remove_pod_sandbox(&id)
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Answer<v1::PodSandboxStatusResponse> {
        let v1::PodSandboxStatusRequest {
            pod_sandbox_id,
            verbose,
        } = request.into_inner();
        let status = self
            .0
            .engine
            .pod_sandbox_status(&pod_sandbox_id, verbose)
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(status))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Answer<v1::ListPodSandboxResponse> {
        let items = self
            .0
            .engine
            .list_pod_sandboxes(request.into_inner().filter.as_ref());
        Ok(Response::new(v1::ListPodSandboxResponse { items }))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let request = request.into_inner();
        let raw = request.encode_to_vec();
        let container_id = self
            .0
            .engine
            .create_container(request, raw)
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::CreateContainerResponse { container_id }))
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerResponse> {
        let id = request.into_inner().container_id;
        self.0
            .engine
            .start_container(&id)
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Answer<v1::StopContainerResponse> {
        let v1::StopContainerRequest {
            container_id,
            timeout,
        } = request.into_inner();
        self.0
            .engine
            .stop_container(&container_id, timeout)
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        self.0
            .engine
            .remove_container(&id)
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Answer<v1::ListContainersResponse> {
        let containers = self
            .0
            .engine
            .list_containers(request.into_inner().filter.as_ref());
        Ok(Response::new(v1::ListContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Answer<v1::ContainerStatusResponse> {
        let v1::ContainerStatusRequest {
            container_id,
            verbose,
        } = request.into_inner();
        let status = self
            .0
            .engine
            .container_status(&container_id, verbose)
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(status))
    }

    async fn exec_sync(&self, request: Request<v1::ExecSyncRequest>) -> Answer<v1::ExecSyncResponse> {
        Ok(Response::new(
            self.0
                .engine
                .exec_sync(request.into_inner())
                .await
                .map_err(|e| of_engine(&e))?,
        ))
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        self.0
            .engine
            .reopen_container_log(&id)
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::ReopenContainerLogResponse {}))
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Answer<v1::ContainerStatsResponse> {
        let id = request.into_inner().container_id;
        let stats = self
            .0
            .engine
            .container_stats(&id)
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::ContainerStatsResponse { stats: Some(stats) }))
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        let filter = request.into_inner().filter;
        let stats = self
            .0
            .engine
            .list_container_stats(filter.as_ref())
            .await
            .map_err(|e| of_engine(&e))?;
        Ok(Response::new(v1::ListContainerStatsResponse { stats }))
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        let request = request.into_inner();
        if request.cmd.is_empty() {
            return Err(Status::invalid_argument("cmd: is empty"));
        }
        let (container, pod) = self.running(&request.container_id)?;
        let url = self.session_url(StreamRequest::Exec(coracle_stream::ExecRequest {
            pod,
            container,
            command: request.cmd,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        }))?;
        Ok(Response::new(v1::ExecResponse { url }))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        let request = request.into_inner();
        let (container, pod) = self.running(&request.container_id)?;
        let url = self.session_url(StreamRequest::Attach(coracle_stream::AttachRequest {
            pod,
            container,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        }))?;
        Ok(Response::new(v1::AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Answer<v1::PortForwardResponse> {
        let request = request.into_inner();
        let pod = self.0.engine.check_ready(&request.pod_sandbox_id);
        let ports = request.port.into_iter().map(|port| {
            let valid = u16::try_from(port).ok().filter(|port| *port != 0);
            valid.ok_or_else(|| Status::invalid_argument(format!("port: {port} is none")))
        });
        let url = self.session_url(StreamRequest::PortForward(coracle_stream::PortForwardRequest {
            pod: pod.map_err(|e| of_engine(&e))?,
            ports: ports.collect::<Result<_, _>>()?,
        }))?;
        Ok(Response::new(v1::PortForwardResponse { url }))
    }

    // What follows is not part of this release; a kubelet falls back where it can.

    async fn stream_pod_sandboxes(
        &self,
        _: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        Err(not_done("StreamPodSandboxes"))
    }

    async fn stream_containers(
        &self,
        _: Request<v1::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        Err(not_done("StreamContainers"))
    }

    async fn update_container_resources(
        &self,
        _: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        Err(not_done("UpdateContainerResources"))
    }

    async fn stream_container_stats(
        &self,
        _: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        Err(not_done("StreamContainerStats"))
    }

    async fn pod_sandbox_stats(
        &self,
        _: Request<v1::PodSandboxStatsRequest>,
    ) -> Answer<v1::PodSandboxStatsResponse> {
        Err(not_done("PodSandboxStats"))
    }

    async fn list_pod_sandbox_stats(
        &self,
        _: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        Err(not_done("ListPodSandboxStats"))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        _: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        Err(not_done("StreamPodSandboxStats"))
    }

    async fn checkpoint_container(
        &self,
        _: Request<v1::CheckpointContainerRequest>,
    ) -> Answer<v1::CheckpointContainerResponse> {
        Err(not_done("CheckpointContainer"))
    }

    async fn get_container_events(
        &self,
        _: Request<v1::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        Err(not_done("GetContainerEvents"))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        Err(not_done("ListMetricDescriptors"))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        Err(not_done("ListPodSandboxMetrics"))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        Err(not_done("StreamPodSandboxMetrics"))
    }

    async fn update_pod_sandbox_resources(
        &self,
        _: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        Err(not_done("UpdatePodSandboxResources"))
    }
}

impl Runtime {
    /// The full ids of a container that runs and of its pod.
    fn running(&self, id: &str) -> Result<(String, String), Status> {
        self.0.engine.check_running(id).map_err(|e| of_engine(&e))
    }

    fn session_url(&self, request: StreamRequest) -> Result<String, Status> {
        self.0.streams.url(request).map_err(|refused| match refused {
            Refused::Invalid(_) => Status::invalid_argument(refused.to_string()),
            Refused::TooMany(_) => Status::resource_exhausted(refused.to_string()),
            Refused::Random(_) => Status::unknown(refused.to_string()),
        })
    }
}

fn condition(name: &str, not_ready: Option<(&str, &str)>) -> RuntimeCondition {
    let (reason, message) = not_ready.unwrap_or_default();
    RuntimeCondition {
        r#type: name.into(),
        status: not_ready.is_none(),
        reason: reason.into(),
        message: message.into(),
    }
}
