//! A daemon in a scratch directory: started, killed, started again, and taken away without a trace.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use coracle_proto::admin::admin_client::AdminClient;
use coracle_proto::admin::{ImportImageHeader, ImportImageRequest, import_image_request::Part};
use coracle_proto::cri::image_service_client::ImageServiceClient;
use coracle_proto::cri::runtime_service_client::RuntimeServiceClient;
use coracle_proto::cri::{
    ContainerConfig, ContainerState, ContainerStatus, ContainerStatusRequest, ExecSyncRequest,
    ExecSyncResponse, ListContainersRequest, ListPodSandboxRequest, PodSandboxConfig, PodSandboxStatus,
    PodSandboxStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest, VersionRequest,
};
use tonic::transport::{Channel, Endpoint};

use crate::image::ImageSpec;
use crate::{oracle, request};

/// How long a daemon may take until it answers.
const START_TIME: Duration = Duration::from_secs(30);

/// How a daemon is started.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Further lines of its configuration.
    pub config: String,
    /// `CORACLE_FAILPOINT` of the next start alone.
    pub failpoint: Option<String>,
}

/// A daemon and its places.
#[derive(Debug)]
pub struct Node {
    /// The scratch directory.
    pub dir: PathBuf,
    /// Pods' log directories are below it.
    pub logs: PathBuf,
    /// Its configuration.
    pub options: Options,
    child: Option<Child>,
    channel: Option<Channel>,
}

impl Node {
    /// Starts a daemon with nothing in it.
    pub async fn start(options: Options) -> Result<Node> {
        let dir = PathBuf::from(format!("/tmp/coracle-it-{}-{}", std::process::id(), unique()));
        let logs = dir.join("logs");
        fs::create_dir_all(&logs)?;
        fs::create_dir_all(dir.join("root"))?;
        oracle::watch(&dir.join("root"));
        let mut node = Node {
            dir,
            logs,
            options,
            child: None,
            channel: None,
        };
        node.spawn().await?;
        Ok(node)
    }

    /// Starts one that has the busybox image.
    pub async fn with_busybox(options: Options) -> Result<Node> {
        let node = Node::start(options).await?;
        node.import(&ImageSpec::busybox(request::BUSYBOX)).await?;
        Ok(node)
    }

    /// Starts the daemon again; with the failpoint of the options, if one is set.
    pub async fn spawn(&mut self) -> Result<()> {
        let mut child = self.launch()?;
        let begun = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                bail!("coracled ended at its start ({status}):\n{}", self.log());
            }
            if let Ok(channel) = self.connect().await {
                let answer = RuntimeServiceClient::new(channel.clone())
                    .version(VersionRequest::default())
                    .await;
                if answer.is_ok() {
                    self.channel = Some(channel);
                    self.child = Some(child);
                    return Ok(());
                }
            }
            if begun.elapsed() > crate::stretched(START_TIME) {
                let _ = child.kill();
                let _ = child.wait();
                bail!("coracled does not answer within {START_TIME:?}:\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Starts the daemon without waiting for an answer.
    pub fn launch(&self) -> Result<Child> {
        let config = self.dir.join("config.toml");
        fs::write(&config, &self.options.config)?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("coracled.log"))?;
        let mut command = Command::new(binary("coracled"));
        command
            .args([
                "--root".as_ref(),
                self.root().as_os_str(),
                "--state".as_ref(),
                self.state().as_os_str(),
            ])
            .args([
                "--socket".as_ref(),
                self.socket().as_os_str(),
                "--config".as_ref(),
                config.as_os_str(),
            ])
            .args([
                "--network",
                "bridge",
                "--log-level",
                "debug",
                "--log-format",
                "text",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .env_remove("CORACLE_FAILPOINT");
        if let Some(failpoint) = &self.options.failpoint {
            command.env("CORACLE_FAILPOINT", failpoint);
        }
        command
            .spawn()
            .with_context(|| format!("start {}", binary("coracled").display()))
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.channel = None;
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// kill -9, then another one on the same directories.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.spawn().await
    }

    /// Waits until the daemon ended by itself (at a failpoint).
    pub async fn wait_ended(&mut self, limit: Duration) -> Result<()> {
        self.channel = None;
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        let begun = Instant::now();
        while child.try_wait()?.is_none() {
            if begun.elapsed() > crate::stretched(limit) {
                self.child = Some(child);
                bail!("coracled did not end within {limit:?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// The daemon's process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        let log = fs::read(self.dir.join("coracled.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Its data root.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Its state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("coracle.sock")
    }

    /// A client of the runtime service.
    pub fn runtime(&self) -> Result<RuntimeServiceClient<Channel>> {
        Ok(RuntimeServiceClient::new(self.channel()?).max_decoding_message_size(16 << 20))
    }

    /// A client of the image service.
    pub fn images(&self) -> Result<ImageServiceClient<Channel>> {
        Ok(ImageServiceClient::new(self.channel()?))
    }

    /// Imports an image; its id.
    pub async fn import(&self, image: &ImageSpec) -> Result<String> {
        let archive = image.archive()?;
        let header = ImportImageRequest {
            part: Some(Part::Header(ImportImageHeader {
                name: image.name.clone(),
            })),
        };
        let chunks: Vec<ImportImageRequest> = archive
            .chunks(256 << 10)
            .map(|chunk| ImportImageRequest {
                part: Some(Part::Chunk(chunk.to_vec().into())),
            })
            .collect();
        let stream = tokio_stream::iter(std::iter::once(header).chain(chunks));
        let answer = AdminClient::new(self.channel()?)
            .import_image(stream)
            .await?
            .into_inner();
        Ok(answer
            .images
            .first()
            .context("the archive held no image")?
            .id
            .clone())
    }

    /// RunPodSandbox.
    pub async fn run_pod(&self, config: &PodSandboxConfig) -> Result<String> {
        fs::create_dir_all(&config.log_directory)?;
        Ok(self
            .runtime()?
            .run_pod_sandbox(request::run(config))
            .await?
            .into_inner()
            .pod_sandbox_id)
    }

    /// CreateContainer.
    pub async fn create(
        &self,
        pod: &str,
        config: &ContainerConfig,
        sandbox: &PodSandboxConfig,
    ) -> Result<String> {
        if let Some(dir) = Path::new(&config.log_path).parent() {
            fs::create_dir_all(Path::new(&sandbox.log_directory).join(dir))?;
        }
        let request = request::create(pod, config, sandbox);
        Ok(self
            .runtime()?
            .create_container(request)
            .await?
            .into_inner()
            .container_id)
    }

    /// StartContainer.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        self.runtime()?
            .start_container(StartContainerRequest {
                container_id: id.into(),
            })
            .await?;
        Ok(())
    }

    /// CreateContainer and StartContainer.
    pub async fn run_container(
        &self,
        pod: &str,
        config: &ContainerConfig,
        sandbox: &PodSandboxConfig,
    ) -> Result<String> {
        let id = self.create(pod, config, sandbox).await?;
        self.start_container(&id).await?;
        Ok(id)
    }

    /// StopContainer.
    pub async fn stop_container(&self, id: &str, seconds: i64) -> Result<()> {
        self.runtime()?
            .stop_container(StopContainerRequest {
                container_id: id.into(),
                timeout: seconds,
            })
            .await?;
        Ok(())
    }

    /// RemoveContainer.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        self.runtime()?
            .remove_container(RemoveContainerRequest {
                container_id: id.into(),
            })
            .await?;
        Ok(())
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&self, id: &str) -> Result<()> {
        self.runtime()?
            .stop_pod_sandbox(StopPodSandboxRequest {
                pod_sandbox_id: id.into(),
            })
            .await?;
        Ok(())
    }

    /// RemovePodSandbox.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        self.runtime()?
            .remove_pod_sandbox(RemovePodSandboxRequest {
                pod_sandbox_id: id.into(),
            })
            .await?;
        Ok(())
    }

    /// PodSandboxStatus.
    pub async fn pod_status(&self, id: &str) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.into(),
            verbose: false,
        };
        self.runtime()?
            .pod_sandbox_status(request)
            .await?
            .into_inner()
            .status
            .context("no status")
    }

    /// ContainerStatus.
    pub async fn status(&self, id: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        self.runtime()?
            .container_status(request)
            .await?
            .into_inner()
            .status
            .context("no status")
    }

    /// ExecSync.
    pub async fn exec(&self, id: &str, command: &[&str], timeout: i64) -> Result<ExecSyncResponse> {
        let cmd = command.iter().map(|word| (*word).to_owned()).collect();
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd,
            timeout,
        };
        Ok(self.runtime()?.exec_sync(request).await?.into_inner())
    }

    /// Waits until a container has exited.
    pub async fn wait_exit(&self, id: &str, limit: Duration) -> Result<ContainerStatus> {
        let begun = Instant::now();
        loop {
            let status = self.status(id).await?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            if begun.elapsed() > crate::stretched(limit) {
                bail!("container {id} is {:?} still after {limit:?}", status.state());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The log of a container, waited for until it holds `text`.
    pub async fn wait_log(&self, status: &ContainerStatus, text: &str, limit: Duration) -> Result<String> {
        let begun = Instant::now();
        loop {
            let log = fs::read_to_string(&status.log_path).unwrap_or_default();
            if log.contains(text) {
                return Ok(log);
            }
            if begun.elapsed() > crate::stretched(limit) {
                bail!(
                    "{} does not hold {text:?} after {limit:?}:\n{log}",
                    status.log_path
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ids of all sandboxes.
    pub async fn pod_ids(&self) -> Result<Vec<String>> {
        let items = self
            .runtime()?
            .list_pod_sandbox(ListPodSandboxRequest::default())
            .await?
            .into_inner()
            .items;
        Ok(items.into_iter().map(|pod| pod.id).collect())
    }

    /// Ids of all containers.
    pub async fn container_ids(&self) -> Result<Vec<String>> {
        let all = self
            .runtime()?
            .list_containers(ListContainersRequest::default())
            .await?
            .into_inner()
            .containers;
        Ok(all.into_iter().map(|container| container.id).collect())
    }

    /// Removes every pod, ends the daemon, and checks that no file of a pod is left.
    pub async fn finish(mut self) -> Result<()> {
        for pod in self.pod_ids().await? {
            self.remove_pod(&pod).await?;
        }
        let left = oracle::pod_files(&self.root(), &self.state());
        if !left.is_empty() {
            bail!("files of pods were left: {left:?}");
        }
        self.terminate().await?;
        fs::remove_dir_all(&self.dir)?;
        Ok(())
    }

    /// SIGTERM, as a service manager ends it.
    pub async fn terminate(&mut self) -> Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        let signal = coracle_kernel::signal::Signal::parse("TERM").context("no such signal")?;
        coracle_kernel::signal::kill(i32::try_from(pid)?, signal)?;
        self.wait_ended(Duration::from_secs(20)).await
    }

    fn channel(&self) -> Result<Channel> {
        self.channel.clone().context("the daemon is not running")
    }

    async fn connect(&self) -> Result<Channel> {
        Ok(Endpoint::try_from(format!("unix://{}", self.socket().display()))?
            .connect()
            .await?)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A test that failed: nothing of it may disturb the next one.
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A program of this build: beside the test, or where `CORACLE_BIN_DIR` says.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    if let Some(dir) = std::env::var_os("CORACLE_BIN_DIR") {
        return PathBuf::from(dir).join(name);
    }
    // target/<profile>/deps/<test>
    let own = std::env::current_exe().unwrap_or_default();
    own.parent()
        .and_then(Path::parent)
        .unwrap_or(Path::new("."))
        .join(name)
}

fn unique() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
