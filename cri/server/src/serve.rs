//! The daemon: everything put together, served, and ended in two stages.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use coracle_cgroup::Host;
use coracle_engine::spec_gen::{Defaults, UnsetSeccomp};
use coracle_engine::{Engine, EngineConfig, Parts};
use coracle_image::{Digest, Home, ImageStore, PullOptions, StoreOptions, Workers};
use coracle_network::{Bridge, CniConfig, Mode, Network, Subnet};
use coracle_proto::admin::admin_server::AdminServer;
use coracle_proto::cri::image_service_server::ImageServiceServer;
use coracle_proto::cri::runtime_service_server::RuntimeServiceServer;
use coracle_snapshot::Snapshotter;
use coracle_store::Store;
use coracle_stream::Server as StreamServer;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tracing::{debug, error, info, warn};

use crate::args::Serve;
use crate::books::{ImageRows, NetworkRows};
use crate::config::{self, Config, MountApi, NetworkMode};
use crate::notify::notify;
use crate::service::{AdminService, Images, Runtime, Shared};
use crate::sessions::EngineSessions;
use crate::startup::{self, Directories};
use crate::status;

/// What kubelets send and take at most.
const MESSAGE_LIMIT_BYTES: usize = 16 << 20;

/// How long calls that are under way at shutdown may take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// How long killed image workers may take to be gone.
const WORKERS_END: Duration = Duration::from_secs(2);

/// Runs until SIGTERM or SIGINT; pods live on.
pub(crate) fn serve(flags: &Serve, config: &Config) -> Result<()> {
    let base = Base::open(flags, config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?;
    let instance = base.instance.clone();
    let outcome = runtime.block_on(run(flags, config, base));
    // Blocking work that still waits for something must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if outcome.is_err() {
        // Refused after they were made.
        leave_cgroups(&instance);
    }
    outcome
}

/// What is opened by blocking calls, before anything asynchronous runs.
struct Base {
    directories: Directories,
    binary: PathBuf,
    instance: String,
    store: Store,
    network: Network,
}

impl Base {
    fn open(flags: &Serve, config: &Config) -> Result<Self> {
        let directories = startup::prepare(&flags.root, &flags.state)?;
        let binary = startup::find_runtime(config)?;
        let instance: String = Digest::sha256(directories.root.as_os_str().as_encoded_bytes())
            .hex()
            .chars()
            .take(8)
            .collect();
        let store = open_store(&directories.root.join("meta.db"))?;
        let network = open_network(flags, config, &instance, &directories.root, store.clone())?;
        Ok(Self {
            directories,
            binary,
            instance,
            store,
            network,
        })
    }
}

async fn run(flags: &Serve, config: &Config, base: Base) -> Result<()> {
    let Base {
        directories,
        binary,
        instance,
        store,
        network,
    } = base;
    let images = Arc::new(open_images(&directories, store.clone(), &instance).await?);
    let network = Arc::new(network);
    let api = match config.runtime.mount_api {
        MountApi::Auto => coracle_snapshot::MountApi::Auto,
        MountApi::Legacy => coracle_snapshot::MountApi::Legacy,
    };
    let snapshots = Arc::new(Snapshotter::open(&directories.root, api)?);
    let program = File::open(&binary).with_context(|| format!("open {}", binary.display()))?;
    let own = instance.clone();
    let engine_config = EngineConfig {
        state: directories.state.clone(),
        layers_mountpoint: directories.root.display().to_string(),
        instance,
        default_handler: "coracle".into(),
        defaults: Defaults {
            unset_seccomp: match config.defaults.unset_seccomp {
                config::UnsetSeccomp::Runtime => UnsetSeccomp::Runtime,
                config::UnsetSeccomp::Unconfined => UnsetSeccomp::Unconfined,
            },
        },
    };
    let parts = Parts {
        store,
        images: Arc::clone(&images),
        snapshots,
        network: Arc::clone(&network),
        monitor_program: coracle_engine::seal_monitor_program(&program)
            .context("copy coracle into a sealed memfd")?,
    };
    let (engine, report) = Engine::open(engine_config, parts).await?;
    for finding in &report.findings {
        warn!(finding, "put right at start");
    }

    let socket = flags.socket.as_ref().unwrap_or(&config.server.socket);
    let listener = startup::bind_socket(socket, &config.server.socket_group, &directories.state)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let streams = open_streams(config, directories.open_files, &engine).await?;
    let (pulls_sender, pulls) = watch::channel(pull_options(config));
    let shared = Shared {
        engine: engine.clone(),
        images,
        network,
        streams: Arc::clone(&streams),
        pulls,
        root: directories.root.clone(),
    };
    let server = Server::builder()
        .add_service(
            RuntimeServiceServer::new(Runtime(shared.clone()))
                .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
                .max_encoding_message_size(MESSAGE_LIMIT_BYTES),
        )
        .add_service(
            ImageServiceServer::new(Images(shared.clone()))
                .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
                .max_encoding_message_size(MESSAGE_LIMIT_BYTES),
        )
        .add_service(AdminServer::new(AdminService(shared)).max_decoding_message_size(MESSAGE_LIMIT_BYTES));

    let (stop, stopped) = watch::channel(false);
    let path = flags.config.clone();
    let signals = tokio::spawn(handle_signals(path, pulls_sender, stop));
    let mut closing = stopped.clone();
    tokio::spawn(async move {
        let stop = async move {
            let _ = closing.wait_for(|stop| *stop).await;
        };
        streams.serve(stop).await;
    });
    info!(socket = %socket.display(), pods = report.pods, "serving");
    notify("READY=1");
    let (mut draining, ending_engine) = (stopped.clone(), engine.clone());
    let serving = server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
        // The sender lives until it has said so; without it there is nobody left to wait for.
        let _ = draining.wait_for(|stop| *stop).await;
        notify("STOPPING=1");
        ending_engine.shut_down();
    });
    // First stage: nothing new, what runs may end. Second stage: the end all the same.
    let mut ending = stopped;
    let limit = async move {
        let _ = ending.wait_for(|stop| *stop).await;
        tokio::time::sleep(DRAIN_LIMIT).await;
    };
    tokio::select! {
        served = serving => served.context("serve")?,
        () = limit => warn!("calls that are still under way are cut off"),
    }
    signals.abort();
    if engine.list_pod_sandboxes(None).is_empty() {
        leave_cgroups(&own);
    }
    let _ = std::fs::remove_file(socket);
    info!("ended; pods live on");
    Ok(())
}

/// SIGTERM and SIGINT end the daemon, SIGHUP reads the configuration anew.
async fn handle_signals(path: Option<PathBuf>, pulls: watch::Sender<PullOptions>, stop: watch::Sender<bool>) {
    let signals = || {
        Ok::<_, std::io::Error>((
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::hangup())?,
        ))
    };
    let (mut terminate, mut interrupt, mut hangup) = match signals() {
        Ok(signals) => signals,
        Err(error) => return error!(%error, "signals cannot be handled"),
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => reload(path.as_deref(), &pulls),
        }
    }
    info!("ending");
    stop.send_replace(true);
}

/// What can change under running pods does; a bad file changes nothing.
fn reload(path: Option<&Path>, pulls: &watch::Sender<PullOptions>) {
    match Config::load(path) {
        Ok(config) => {
            pulls.send_replace(pull_options(&config));
            info!("configuration read anew: [image] is in force, the rest at the next start");
        }
        Err(error) => error!(
            error = format!("{error:#}"),
            "the configuration was not read anew"
        ),
    }
}

fn open_store(path: &Path) -> Result<Store> {
    let opened = Store::open(path)?;
    for finding in &opened.findings {
        warn!(finding, "database");
    }
    Ok(opened.store)
}

async fn open_images(directories: &Directories, store: Store, instance: &str) -> Result<ImageStore> {
    let instance = instance.to_owned();
    let workers = Workers::new(Path::new("/proc/self/exe")).at_home(move || {
        workers_home(&instance).unwrap_or_else(|error| {
            warn!(
                error = format!("{error:#}"),
                "image workers run in the daemon's own cgroup"
            );
            Home::default()
        })
    });
    let options = StoreOptions {
        root: directories.root.clone(),
        workers,
        limits: coracle_image::Limits::default(),
    };
    Ok(ImageStore::open(options, Arc::new(ImageRows(store))).await?)
}

/// Workers are kept apart from the daemon: they must not starve it.
fn workers_home(instance: &str) -> Result<Home> {
    let host = Host::detect()?;
    let manager = coracle_cgroup::make_workers(&host, instance)?;
    Ok(match manager.place()? {
        coracle_cgroup::Placement::Into(directory) => Home {
            cgroup: Some(directory),
            cgroup_tasks: Vec::new(),
        },
        coracle_cgroup::Placement::Itself(tasks) => Home {
            cgroup: None,
            cgroup_tasks: tasks,
        },
    })
}

/// A daemon without pods leaves no group behind.
fn leave_cgroups(instance: &str) {
    let removed = Host::detect().and_then(|host| {
        // Nobody is left who would hear what they bring.
        coracle_cgroup::end_workers(&host, instance, WORKERS_END)?;
        coracle_cgroup::remove_own(&host, instance)
    });
    match removed {
        Ok(true) => {}
        // Pods of a daemon that was refused live on.
        Ok(false) => debug!("the daemon's own cgroups stay: there are processes in them"),
        Err(error) => warn!(error = status::chain(&error), "the daemon's own cgroups stay"),
    }
}

fn open_network(
    flags: &Serve,
    config: &Config,
    instance: &str,
    root: &Path,
    store: Store,
) -> Result<Network> {
    let mode = match flags.network.unwrap_or(config.network.mode) {
        NetworkMode::Bridge => {
            let (address, prefix) = config.subnet()?;
            Mode::Bridge(Bridge {
                subnet: Subnet::new(address, prefix)?,
                subnet_v6: config.subnet_v6()?,
                mtu: config.network.mtu,
                masquerade: true,
            })
        }
        NetworkMode::Cni => Mode::Cni(CniConfig {
            conf_dir: config.network.cni_conf_dir.clone(),
            bin_dirs: config.network.cni_bin_dirs.clone(),
            timeout: Duration::from_secs(config.network.cni_timeout_seconds.into()),
            template: Some(config.network.cni_conf_template.clone())
                .filter(|path| !path.as_os_str().is_empty()),
            pod_cidr_file: Some(root.join("pod-cidr")),
        }),
    };
    let mut network = Network::new(instance, mode, Arc::new(NetworkRows(store)))?;
    if let Err(error) = network.contain_plugins(instance) {
        warn!(
            error = status::chain(&error),
            "CNI plugins run in the daemon's own cgroup"
        );
    }
    Ok(network)
}

async fn open_streams(
    config: &Config,
    descriptors: u64,
    engine: &Engine,
) -> Result<Arc<StreamServer<EngineSessions>>> {
    let (address, sessions) = (config.stream.address, Arc::new(EngineSessions(engine.clone())));
    let tls = startup::read_tls(&config.stream)?;
    let server = StreamServer::bind(
        address,
        tls,
        coracle_stream::Limits::within(descriptors),
        sessions,
    )
    .await;
    server
        .map(Arc::new)
        .with_context(|| format!("listen at [stream] address {address}"))
}

fn pull_options(config: &Config) -> PullOptions {
    PullOptions {
        certs_dir: config.image.certs_dir.clone(),
        fetch_uid: config.image.fetch_uid,
    }
}
