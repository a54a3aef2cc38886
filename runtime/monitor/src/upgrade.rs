//! The same pod, children and streams in another program: the state goes into a memfd, execve takes the place of this
//! program, and pid, children and descriptors stay. What containers write meanwhile waits in their pipes.

use std::ffi::CString;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;

use coracle_kernel::epoll::Interest;
use coracle_kernel::{Errno, exec, fd};
use coracle_wire::{ContainerState, Done, FailKind, Failed, LISTENER_FD, Server};
use prost::Message as _;

use crate::connection::{Connection, Packet, failed};
use crate::container::{Container, Output, Reply};
use crate::log::{Gap, Log};
use crate::monitor::{Exec, Monitor, MonitorError, PodInit, Sandbox, Token, call};
use crate::refusal::kernel;
use crate::say;
use crate::state::{
    ConnectionState, ContainerRecord, ExecState, GapState, LogState, MonitorState, OutputState, PacketState,
    PodInitState, SandboxState, VERSION,
};

/// Longest state taken: a pod's containers with a line's beginning each are far below it.
const MAX_STATE: u64 = 64 << 20;

/// Where the listening socket waits while descriptor 3 is the state: above it.
const ABOVE: i32 = LISTENER_FD + 1;

impl Monitor {
    /// Takes note of a program to become. Requests stay unread from here on: the new program reads them.
    pub(crate) fn begin_upgrade(&mut self, reply: Reply, program: Option<OwnedFd>) -> Result<(), Failed> {
        let Some(program) = program else {
            return Err(failed(FailKind::Invalid, "no program came along"));
        };
        if !fd::is_sealed(&program) {
            return Err(failed(FailKind::Invalid, "the program is not a sealed memfd"));
        }
        self.upgrade = Some((reply, program));
        Ok(())
    }

    /// Becomes the new program, once nothing is half-done. Returns only if there is none, or it cannot be executed.
    pub(crate) fn try_upgrade(&mut self) {
        if self
            .containers
            .iter()
            .any(|container| container.starting.is_some())
        {
            return;
        }
        let Some((reply, program)) = self.upgrade.take() else {
            return;
        };
        let failed = self.become_program(reply, &program);
        self.answer(reply, failed, Vec::new());
        self.after_sending(Ok(()));
    }

    /// Takes over from the program before.
    pub(crate) fn resume(given: OwnedFd) -> Result<Monitor, MonitorError> {
        let mut bytes = Vec::new();
        let read = File::from(given).take(MAX_STATE).read_to_end(&mut bytes);
        read.map_err(|error| MonitorError::State(error.to_string()))?;
        let state =
            MonitorState::decode(bytes.as_slice()).map_err(|error| MonitorError::State(error.to_string()))?;
        drop(bytes);
        if state.version != VERSION {
            let text = format!("of version {}, this program reads {VERSION}", state.version);
            return Err(MonitorError::State(text));
        }
        // The listener's place is 3 in every program, so that this one can be upgraded too.
        let listener = take(state.listener)?;
        fd::place(&[(listener.as_fd(), LISTENER_FD)]).map_err(|errno| {
            call("put the listener in its place")(coracle_kernel::Error::new("dup2", "", errno))
        })?;
        drop(listener);
        let mut monitor = Monitor::new(take(LISTENER_FD)?, &state.oom_score)?;
        monitor.connection_number = 1;
        monitor.sandbox = state.sandbox.map(resume_sandbox).transpose()?;
        monitor.connection = state.connection.map(resume_connection).transpose()?;
        if let Some(connection) = &monitor.connection {
            let watched = monitor
                .epoll
                .add(connection, Token::Connection.with(0), Interest::READ);
            watched.map_err(call("watch the connection"))?;
        }
        for record in state.containers {
            let serial = monitor.next_serial();
            let mut container = resume_container(serial, record)?;
            if container.exit.is_none() {
                container.watch_oom();
            }
            monitor.containers.push(container);
            monitor.watch(serial).map_err(call("watch a container"))?;
        }
        for exec in state.execs {
            let (serial, pidfd) = (monitor.next_serial(), take(exec.pidfd)?);
            monitor
                .epoll
                .add(&pidfd, Token::Exec.with(serial), Interest::READ)
                .map_err(call("watch a process"))?;
            let (id, container_id) = (exec.id, exec.container_id);
            monitor.execs.push(Exec {
                id,
                container_id,
                pid: exec.pid,
                pidfd,
            });
        }
        monitor.answer(
            Reply {
                connection: 1,
                id: state.request,
            },
            Done {},
            Vec::new(),
        );
        monitor.after_sending(Ok(()));
        // The signal of a child that ended in between may have been taken by the program before.
        monitor.reap();
        Ok(monitor)
    }

    /// Returns only the failure, with everything as it was.
    fn become_program(&mut self, reply: Reply, program: &OwnedFd) -> Failed {
        let above = match fd::dup_above(&self.listener, ABOVE) {
            Ok(above) => above,
            Err(error) => return kernel("keep the listener")(error),
        };
        let mut kept = vec![above.as_fd()];
        let state = self.save(reply, &above, &mut kept);
        let failed = (|| {
            let state = fd::sealed_memfd(c"coracle-monitor-state", &state.encode_to_vec())
                .map_err(kernel("write the state"))?;
            for fd in &kept {
                fd::set_cloexec(fd, false).map_err(kernel("keep a descriptor"))?;
            }
            let placed = fd::place(&[(state.as_fd(), LISTENER_FD)]);
            let placed = placed.map_err(|errno| coracle_kernel::Error::new("dup2", "3", errno));
            placed.map_err(kernel("put the state in its place"))?;
            // Called by the name that we were called by.
            let own = std::env::args_os()
                .next()
                .and_then(|name| CString::new(name.into_vec()).ok());
            let args = [own.unwrap_or_else(|| c"coracle".into()), c"monitor".into()];
            let error = exec::execve_fd(program.as_fd(), &args, &[]);
            Err::<(), _>(kernel("execute the new program")(error))
        })();
        // Nothing was replaced: what was changed for it is changed back.
        for fd in &kept {
            let _ = fd::set_cloexec(fd, true);
        }
        let _ = fd::place(&[(above.as_fd(), LISTENER_FD)]);
        let _ = fd::set_cloexec(&self.listener, true);
        let failed = failed.err().unwrap_or_default();
        say(&format!("upgrade: {}", failed.message));
        failed
    }

    fn save<'a>(
        &'a self,
        reply: Reply,
        listener: &'a OwnedFd,
        kept: &mut Vec<BorrowedFd<'a>>,
    ) -> MonitorState {
        let mut keep = |fd: &'a dyn AsFd| -> i32 {
            kept.push(fd.as_fd());
            fd::number(fd.as_fd())
        };
        MonitorState {
            version: VERSION,
            listener: fd::number(listener),
            oom_score: self.oom_score.clone(),
            request: if reply.connection == self.connection_number {
                reply.id
            } else {
                0
            },
            connection: self.connection.as_ref().map(|connection| {
                let (session, queue) = connection.parts();
                let (version, last_id, pending) = session.position();
                let packet = |packet: &'a Packet, keep: &mut dyn FnMut(&'a dyn AsFd) -> i32| PacketState {
                    bytes: packet.bytes.clone(),
                    fds: packet.fds.iter().map(|fd| keep(fd)).collect(),
                };
                ConnectionState {
                    socket: keep(connection),
                    version,
                    last_id,
                    pending: pending as u64,
                    unsent: queue.iter().map(|one| packet(one, &mut keep)).collect(),
                }
            }),
            sandbox: self.sandbox.as_ref().map(|sandbox| SandboxState {
                pod_id: sandbox.pod_id.clone(),
                pod_dir: sandbox.pod_dir.clone(),
                ipc: sandbox.ipc.as_ref().map(|fd| keep(fd)),
                uts: sandbox.uts.as_ref().map(|fd| keep(fd)),
                mnt: sandbox.mnt.as_ref().map(|fd| keep(fd)),
                init: sandbox.init.as_ref().map(|init| PodInitState {
                    pid: init.pid,
                    pidfd: keep(&init.pidfd),
                    namespace: keep(&init.namespace),
                }),
            }),
            containers: self
                .containers
                .iter()
                .map(|container| save_container(container, &mut keep))
                .collect(),
            execs: self
                .execs
                .iter()
                .map(|exec| ExecState {
                    id: exec.id.clone(),
                    container_id: exec.container_id.clone(),
                    pid: exec.pid,
                    pidfd: keep(&exec.pidfd),
                })
                .collect(),
        }
    }
}

fn save_container<'a>(
    container: &'a Container,
    keep: &mut dyn FnMut(&'a dyn AsFd) -> i32,
) -> ContainerRecord {
    let [stdout, stderr] = &container.outputs;
    let mut output = |output: &'a Option<Output>| {
        output.as_ref().map(|output| OutputState {
            fd: keep(&output.fd),
            pending: output.pending.clone(),
            terminal: output.terminal,
        })
    };
    let (stdout, stderr) = (output(stdout), output(stderr));
    ContainerRecord {
        id: container.id.clone(),
        bundle: container.bundle.clone(),
        state: container.state.into(),
        pid: container.pid,
        pidfd: container.pidfd.as_ref().map(|fd| keep(fd)),
        start: container.start.as_ref().map(|fd| keep(fd)),
        stdout,
        stderr,
        stdin: container.stdin.as_ref().map(|fd| keep(fd)),
        log: container.log.as_ref().map(|log| LogState {
            path: log.path().to_owned(),
            file: keep(log.file()),
            lost: log.lost(),
            gap: log.gap().map(|gap| GapState {
                bytes: gap.bytes,
                errno: gap.errno.raw(),
                torn: gap.torn,
            }),
        }),
        log_lost: container.log_lost,
        loss_told: container.loss_told,
        cgroup: container.cgroup.clone(),
        oom_kills: container.oom_kills,
        exit: container.exit,
        poststart: container.poststart,
        poststop: container.poststop,
        stdin_once: container.stdin_once,
    }
}

fn resume_container(serial: u32, record: ContainerRecord) -> Result<Container, MonitorError> {
    let output = |state: Option<OutputState>| {
        let resume = |state: OutputState| {
            Ok(Output {
                fd: take(state.fd)?,
                pending: state.pending,
                terminal: state.terminal,
            })
        };
        state.map(resume).transpose()
    };
    let state = record.state();
    if state == ContainerState::Creating {
        return Err(MonitorError::State(format!(
            "container {:?} is half-made",
            record.id
        )));
    }
    let log = record.log.map(|log| {
        let gap = log.gap.map(|gap| Gap {
            bytes: gap.bytes,
            errno: Errno::from_raw(gap.errno),
            retry_ns: 0,
            torn: gap.torn,
        });
        Ok::<_, MonitorError>(Log::resume(log.path, take(log.file)?.into(), log.lost, gap))
    });
    let mut container = Container::new(serial, record.id, record.bundle, log.transpose()?);
    container.state = state;
    container.pid = record.pid;
    container.pidfd = take_some(record.pidfd)?;
    container.start = take_some(record.start)?;
    container.outputs = [output(record.stdout)?, output(record.stderr)?];
    container.stdin = take_some(record.stdin)?;
    container.log_lost = record.log_lost;
    container.loss_told = record.loss_told;
    container.cgroup = record.cgroup;
    container.oom_kills = record.oom_kills;
    container.exit = record.exit;
    container.poststart = record.poststart;
    container.poststop = record.poststop;
    container.stdin_once = record.stdin_once;
    Ok(container)
}

fn resume_sandbox(state: SandboxState) -> Result<Sandbox, MonitorError> {
    Ok(Sandbox {
        pod_id: state.pod_id,
        pod_dir: state.pod_dir,
        ipc: take_some(state.ipc)?,
        uts: take_some(state.uts)?,
        mnt: take_some(state.mnt)?,
        init: state.init.as_ref().map(resume_init).transpose()?,
    })
}

fn resume_init(state: &PodInitState) -> Result<PodInit, MonitorError> {
    Ok(PodInit {
        pid: state.pid,
        pidfd: take(state.pidfd)?,
        namespace: take(state.namespace)?,
    })
}

fn resume_connection(state: ConnectionState) -> Result<Connection, MonitorError> {
    let pending = usize::try_from(state.pending).unwrap_or(usize::MAX);
    let session = Server::resume(state.version, state.last_id, pending);
    let packet = |packet: PacketState| {
        let fds = packet.fds.into_iter().map(take).collect::<Result<_, _>>()?;
        Ok::<_, MonitorError>(Packet {
            bytes: packet.bytes,
            fds,
        })
    };
    let queue = state.unsent.into_iter().map(packet).collect::<Result<_, _>>()?;
    Ok(Connection::resume(take(state.socket)?, session, queue))
}

fn take(number: i32) -> Result<OwnedFd, MonitorError> {
    fd::inherited(number).map_err(call("take over a descriptor"))
}

fn take_some(number: Option<i32>) -> Result<Option<OwnedFd>, MonitorError> {
    number.map(take).transpose()
}
