//! What the daemon asks for, up to the helper that does it.

use std::os::fd::OwnedFd;

use coracle_container::Release;
use coracle_kernel::clone::own_pid;
use coracle_kernel::epoll::Interest;
use coracle_kernel::signal::Signal;
use coracle_kernel::{fd, pidfd, scm};
use coracle_wire::{
    Adopt, Body, ContainerState, Create, Created, Done, Exec, ExecProcess, FailKind, Forget, Hello, List,
    Listed, ReopenLog, Sandbox as WireSandbox, SetupSandbox, Shutdown, Start, Welcome,
};

use crate::connection::failed;
use crate::container::{Container, Output, Reply, Starting, now};
use crate::deadlines::deadline;
use crate::helper::Job;
use crate::log::Log;
use crate::monitor::{Monitor, PodInit, Sandbox, Token};
use crate::pod_mounts::PodMounts;
use crate::refusal::{Outcome, check_exec_id, check_id, check_path, kernel, not_in_state};
use crate::work;

/// Most containers at a time, exited ones included; far more than a pod has.
const MAX_CONTAINERS: usize = 1024;

/// Most processes of execs at a time.
const MAX_EXECS: usize = 1024;

/// Most bytes of entries in one answer to [`List`].
const LIST_BYTES: usize = 48 << 10;

impl Monitor {
    /// Serves a request: answers at once, or has a helper or an event answer it later.
    pub(crate) fn request(&mut self, reply: Reply, body: Body, fds: Vec<OwnedFd>) {
        let mut fds = fds.into_iter();
        let outcome = match body {
            Body::Hello(hello) => self.welcome(reply, &hello),
            Body::SetupSandbox(setup) => self.setup(reply, setup, fds.next()),
            Body::Create(create) => self.create(reply, create, fds.next()),
            Body::Start(start) => self.start(reply, &start),
            Body::Exec(exec) => self.exec(reply, exec, fds),
            Body::Attach(attach) => self.attach(reply, &attach, fds),
            Body::ReopenLog(reopen) => self.reopen(reply, &reopen),
            Body::Forget(forget) => self.forget(reply, &forget),
            Body::List(list) => {
                let listed = self.list(&list);
                self.answer(reply, listed, Vec::new());
                Ok(())
            }
            Body::Adopt(adopt) => self.adopt(reply, &adopt),
            Body::Upgrade(_) => self.begin_upgrade(reply, fds.next()),
            Body::Shutdown(Shutdown {}) => self.shut_down(reply),
            // The session lets nothing else through.
            other => Err(failed(
                FailKind::Unsupported,
                format!("{} is no request", other.name()),
            )),
        };
        match outcome {
            Ok(()) => self.after_sending(Ok(())),
            Err(failed) => self.answer(reply, failed, Vec::new()),
        }
    }

    /// The pod as others are told of it.
    pub(crate) fn described(&self) -> Option<WireSandbox> {
        let sandbox = self.sandbox.as_ref()?;
        let path = |fd: Option<&OwnedFd>| {
            fd.map_or_else(String::new, |fd| {
                format!("/proc/{}/fd/{}", own_pid(), fd::number(fd))
            })
        };
        Some(WireSandbox {
            pod_id: sandbox.pod_id.clone(),
            ipc: path(sandbox.ipc.as_ref()),
            uts: path(sandbox.uts.as_ref()),
            user: String::new(),
            pid: path(sandbox.init.as_ref().map(|init| &init.namespace)),
            mnt: path(sandbox.mnt.as_ref()),
        })
    }

    fn welcome(&mut self, reply: Reply, hello: &Hello) -> Outcome {
        let welcome = Welcome {
            version: hello.max,
            pid: own_pid(),
            program: env!("CARGO_PKG_VERSION").to_owned(),
            sandbox: self.described(),
        };
        self.answer(reply, welcome, Vec::new());
        Ok(())
    }

    fn setup(&mut self, reply: Reply, setup: SetupSandbox, netns: Option<OwnedFd>) -> Outcome {
        check_id("pod_id", &setup.pod_id)?;
        check_path("pod_dir", &setup.pod_dir)?;
        let setting_up = self
            .helpers
            .iter()
            .any(|helper| matches!(helper.job, Job::Setup { .. }));
        if self.sandbox.is_some() || setting_up {
            return Err(failed(FailKind::Exists, "the pod has been set up before"));
        }
        if setup.user.is_some() {
            return Err(failed(
                FailKind::Unsupported,
                "pods with a user namespace are not supported yet",
            ));
        }
        if setup.pid == setup.pid_cgroup.is_empty() {
            return Err(failed(
                FailKind::Invalid,
                "pid_cgroup: to be given with pid, and with it alone",
            ));
        }
        let work = work::Setup {
            pod_dir: setup.pod_dir.clone(),
            hostname: setup.hostname,
            sysctls: setup.sysctls,
            ipc: setup.ipc,
            uts: setup.uts,
            shm_bytes: setup.shm_bytes,
            netns,
            pid_cgroup: setup.pid_cgroup,
        };
        let job = Job::Setup {
            reply,
            pod_id: setup.pod_id,
            pod_dir: setup.pod_dir,
        };
        self.help(work, job, 0).map_err(kernel("clone a helper"))
    }

    fn create(&mut self, reply: Reply, create: Create, rootfs: Option<OwnedFd>) -> Outcome {
        check_id("container_id", &create.container_id)?;
        check_path("bundle", &create.bundle)?;
        if self.find(&create.container_id).is_ok() {
            return Err(failed(
                FailKind::Exists,
                format!("container {:?} exists", create.container_id),
            ));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            return Err(failed(
                FailKind::State,
                format!("more than {MAX_CONTAINERS} containers"),
            ));
        }
        let log = if create.log_path.is_empty() {
            None
        } else {
            check_path("log_path", &create.log_path)?;
            Some(Log::open(create.log_path).map_err(kernel("open the log"))?)
        };
        let serial = self.next_serial();
        let mut container = Container::new(serial, create.container_id.clone(), create.bundle.clone(), log);
        let pipe = || fd::pipe().map_err(kernel("make a pipe"));
        let mut stdio = [None, None, None];
        if !create.tty {
            if create.stdin {
                let (read, write) = pipe()?;
                (stdio[0], container.stdin) = (Some(read), Some(write));
                container.stdin_once = create.stdin_once;
            } else {
                let null = std::fs::File::open("/dev/null");
                let failed =
                    |error| kernel("open /dev/null")(coracle_kernel::Error::from_io("open", "", &error));
                stdio[0] = Some(null.map_err(failed)?.into());
            }
            for (end, output) in stdio.iter_mut().skip(1).zip(&mut container.outputs) {
                let (read, write) = pipe()?;
                *end = Some(write);
                *output = Some(Output::new(read, false).map_err(kernel("set up a pipe"))?);
            }
        }
        let (start, theirs) =
            scm::pair(scm::Kind::Seqpacket, scm::Mode::Blocking).map_err(kernel("make a socket"))?;
        container.start = Some(start);
        let work = work::Create {
            id: create.container_id,
            bundle: create.bundle,
            tty: create.tty,
            rootfs,
            stdio,
            start: theirs,
            mounts: self.mounts()?,
        };
        // On the list first: what the helper makes must find its place.
        self.containers.push(container);
        let made = self.watch(serial).and_then(|()| {
            self.help(
                work,
                Job::Create {
                    reply,
                    container: serial,
                },
                create.deadline_ms,
            )
        });
        made.map_err(|error| {
            self.containers.retain(|container| container.serial != serial);
            kernel("clone a helper")(error)
        })
    }

    /// The pod's mounts, for a container that may want them.
    fn mounts(&self) -> Outcome<Option<PodMounts>> {
        let Some(Sandbox {
            mnt: Some(mnt),
            pod_dir,
            ipc,
            ..
        }) = &self.sandbox
        else {
            return Ok(None);
        };
        let namespace = fd::dup(mnt).map_err(kernel("duplicate the pod's mount namespace"))?;
        Ok(Some(PodMounts {
            namespace,
            pod_dir: pod_dir.clone(),
            shm: ipc.is_some(),
        }))
    }

    fn start(&mut self, reply: Reply, start: &Start) -> Outcome {
        let index = self.find(&start.container_id)?;
        let Some(container) = self.containers.get_mut(index) else {
            return Ok(());
        };
        match (container.state, &mut container.starting) {
            (ContainerState::Created, _) => {}
            (ContainerState::Running, Some(starting)) => {
                starting.replies.push(reply);
                return Ok(());
            }
            (ContainerState::Running, None) => {
                self.answer(reply, Done {}, Vec::new());
                return Ok(());
            }
            (state, _) => return Err(not_in_state(container, "start", state)),
        }
        let Some(socket) = container.start.take() else {
            return Err(failed(FailKind::Other, "the init's socket is gone"));
        };
        container.state = ContainerState::Running;
        let (deadline_ns, serial) = (deadline(start.deadline_ms), container.serial);
        let begun = Release::begin(socket).map_err(|error| failed(FailKind::State, error.to_string()))?;
        if let Err(error) = self
            .epoll
            .add(&begun, Token::Starting.with(serial), Interest::READ)
        {
            container.kill();
            return Err(kernel("watch the start")(error));
        }
        container.starting = Some(Starting {
            release: begun,
            deadline_ns,
            replies: vec![reply],
        });
        Ok(())
    }

    fn exec(&mut self, reply: Reply, exec: Exec, mut fds: impl Iterator<Item = OwnedFd>) -> Outcome {
        check_exec_id(&exec.exec_id)?;
        let index = self.find(&exec.container_id)?;
        let executing = |helper: &crate::helper::Helper| matches!(&helper.job, Job::Exec { exec_id, .. } if *exec_id == exec.exec_id);
        if self.execs.iter().any(|one| one.id == exec.exec_id) || self.helpers.iter().any(executing) {
            return Err(failed(
                FailKind::Exists,
                format!("exec {:?} exists", exec.exec_id),
            ));
        }
        if self.execs.len() >= MAX_EXECS {
            return Err(failed(
                FailKind::State,
                format!("more than {MAX_EXECS} processes of execs"),
            ));
        }
        let Some(container) = self.containers.get(index) else {
            return Ok(());
        };
        let (ContainerState::Running | ContainerState::Created, Some(init)) =
            (container.state, &container.pidfd)
        else {
            return Err(not_in_state(container, "exec in", container.state));
        };
        if exec.tty && (exec.stdin || exec.stdout || exec.stderr) {
            return Err(failed(
                FailKind::Invalid,
                "tty: excludes stdin, stdout and stderr",
            ));
        }
        let Some(process) = fds.next() else {
            return Err(failed(FailKind::Invalid, "no process document"));
        };
        let mut stdio = [None, None, None];
        if !exec.tty {
            for (end, given) in stdio.iter_mut().zip([exec.stdin, exec.stdout, exec.stderr]) {
                *end = if given {
                    fds.next()
                } else {
                    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
                    let failed =
                        |error| kernel("open /dev/null")(coracle_kernel::Error::from_io("open", "", &error));
                    Some(null.map_err(failed)?.into())
                };
            }
        }
        let job = Job::Exec {
            reply,
            exec_id: exec.exec_id,
            container: container.serial,
            tty: exec.tty,
        };
        let work = work::Exec {
            container_id: exec.container_id,
            bundle: container.bundle.clone(),
            init: fd::dup(init).map_err(kernel("duplicate the init's pidfd"))?,
            init_pid: container.pid,
            process,
            stdio,
            tty: exec.tty,
            cgroup: if exec.cgroup.is_empty() {
                container.cgroup.clone()
            } else {
                exec.cgroup
            },
        };
        self.help(work, job, exec.deadline_ms)
            .map_err(kernel("clone a helper"))
    }

    fn reopen(&mut self, reply: Reply, reopen: &ReopenLog) -> Outcome {
        let index = self.find(&reopen.container_id)?;
        let Some(container) = self.containers.get_mut(index) else {
            return Ok(());
        };
        let serial = container.serial;
        match (container.state, &mut container.log) {
            (ContainerState::Created | ContainerState::Running, Some(log)) => {
                log.reopen(now()).map_err(kernel("open the log"))?;
            }
            // Nothing to open anew is nothing to fail at.
            (ContainerState::Created | ContainerState::Running, None) => {}
            (state, _) => return Err(not_in_state(container, "reopen the log of", state)),
        }
        self.tell_of_loss(serial);
        self.answer(reply, Done {}, Vec::new());
        Ok(())
    }

    fn forget(&mut self, reply: Reply, forget: &Forget) -> Outcome {
        let Ok(index) = self.find(&forget.container_id) else {
            self.answer(reply, Done {}, Vec::new());
            return Ok(());
        };
        let Some(container) = self.containers.get_mut(index) else {
            return Ok(());
        };
        if container.state != ContainerState::Exited {
            return Err(not_in_state(container, "forget", container.state));
        }
        if !container.poststop {
            self.containers.remove(index);
            self.answer(reply, Done {}, Vec::new());
            return Ok(());
        }
        container.forgetting.push(reply);
        if container.forgetting.len() > 1 {
            return Ok(());
        }
        let work = work::Hooks {
            which: coracle_container::LateHooks::Poststop,
            container_id: container.id.clone(),
            bundle: container.bundle.clone(),
            pid: 0,
        };
        let job = Job::Poststop {
            container: container.serial,
        };
        self.help(work, job, 0).map_err(|error| {
            if let Some(container) = self.containers.get_mut(index) {
                container.forgetting.clear();
            }
            kernel("clone a helper")(error)
        })
    }

    fn list(&self, list: &List) -> Listed {
        let mut containers: Vec<&Container> = self
            .containers
            .iter()
            .filter(|container| container.id > list.after)
            .collect();
        containers.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        let mut listed = Listed::default();
        let mut room = LIST_BYTES;
        for container in containers {
            let entry = container.listed();
            let size = prost::Message::encoded_len(&entry) + 8;
            if size > room {
                listed.more = true;
                return listed;
            }
            room -= size;
            listed.containers.push(entry);
        }
        for exec in &self.execs {
            let entry = ExecProcess {
                exec_id: exec.id.clone(),
                container_id: exec.container_id.clone(),
                pid: exec.pid,
            };
            let size = prost::Message::encoded_len(&entry) + 8;
            // They end by themselves, and who connects anew has none of them: the first are as good as all.
            if size > room {
                break;
            }
            room -= size;
            listed.execs.push(entry);
        }
        listed
    }

    fn adopt(&mut self, reply: Reply, adopt: &Adopt) -> Outcome {
        let index = self.find(&adopt.container_id)?;
        let Some(container) = self.containers.get(index) else {
            return Ok(());
        };
        let Some(pidfd) = &container.pidfd else {
            return Err(not_in_state(container, "adopt", container.state));
        };
        let pidfd = fd::dup(pidfd).map_err(kernel("duplicate the init's pidfd"))?;
        let created = Created { pid: container.pid };
        self.answer(reply, created, vec![pidfd]);
        Ok(())
    }

    fn shut_down(&mut self, reply: Reply) -> Outcome {
        if !self.containers.is_empty() || !self.helpers.is_empty() {
            return Err(failed(FailKind::State, "the pod has containers"));
        }
        if let Some(PodInit { pidfd, .. }) = self.sandbox.as_ref().and_then(|sandbox| sandbox.init.as_ref()) {
            // It would die with us; so the daemon finds its cgroup empty a moment earlier.
            let _ = pidfd::send_signal(pidfd, Signal::KILL);
        }
        self.ending = true;
        self.answer(reply, Done {}, Vec::new());
        Ok(())
    }

    pub(crate) fn find(&self, id: &str) -> Outcome<usize> {
        let index = self.containers.iter().position(|container| container.id == id);
        index.ok_or_else(|| failed(FailKind::NotFound, format!("container {id:?} is not known")))
    }
}
