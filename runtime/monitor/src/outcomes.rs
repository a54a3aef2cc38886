//! What comes of requests: helpers' reports, starts, ends, and what did not come in time.

use std::os::fd::OwnedFd;

use coracle_container::{Error as ContainerError, FailureKind, LateHooks};
use coracle_kernel::epoll::Interest;
use coracle_kernel::signal::Signal;
use coracle_kernel::wait::{Exit as Ended, Status};
use coracle_kernel::{fd, pidfd};
use coracle_wire::{Body, ContainerState, Created, Done, ExecExited, ExecStarted, Exited, FailKind, Failed};

use crate::connection::failed;
use crate::container::{Container, Output, Reply, exit_of};
use crate::helper::{Heard, Helper, Job, Made};
use crate::monitor::{Exec, Monitor, PodInit, Sandbox, Token};
use crate::say;
use crate::work;

impl Monitor {
    /// Hears a helper whose socket is readable; whether it goes on.
    pub(crate) fn hear(&mut self, serial: u32) -> bool {
        let Some(index) = self.helpers.iter().position(|helper| helper.serial == serial) else {
            return false;
        };
        let Some(helper) = self.helpers.get_mut(index) else {
            return false;
        };
        match helper.hear() {
            Heard::Step => return true,
            Heard::Made(made, fds) => {
                let helper = self.helpers.remove(index);
                for warning in &made.warnings {
                    say(warning);
                }
                // What has come to an end before its helper told of it is among the strangers from here on.
                // Another helper may be heard meanwhile, and when that is done this one is still not.
                let outer = std::mem::replace(&mut self.telling, true);
                self.reap();
                self.telling = outer;
                if let Err((reply, failed)) = self.made(helper.job, made, fds) {
                    self.answer(reply, failed, Vec::new());
                }
            }
            Heard::Failed(failed) => {
                let helper = self.helpers.remove(index);
                self.lost_child = true;
                helper.kill();
                self.helper_failed(helper.job, failed);
            }
        }
        false
    }

    /// Hears everything that an ended helper has said, while its process group is still its own.
    pub(crate) fn helper_ended(&mut self, pid: i32) {
        let Some(serial) = self
            .helpers
            .iter()
            .find(|helper| helper.child.pid == pid)
            .map(|helper| helper.serial)
        else {
            return;
        };
        while self.hear(serial) {}
    }

    /// Ends a helper whose deadline has passed.
    pub(crate) fn helper_late(&mut self, helper: Helper) {
        helper.kill();
        self.lost_child = true;
        let text = format!("deadline passed while it had to {}", helper.step);
        let late = Failed {
            step: helper.step,
            ..failed(FailKind::Deadline, text)
        };
        self.helper_failed(helper.job, late);
    }

    /// Goes on with a start whose socket is readable.
    pub(crate) fn go_on_starting(&mut self, serial: u32) {
        let Some(container) = self.by_serial(serial) else {
            return;
        };
        let Some(starting) = &mut container.starting else {
            return;
        };
        let outcome = match starting.release.step() {
            Ok(false) => return,
            Ok(true) => Ok(()),
            Err(error) => Err(start_failure(&error)),
        };
        // Closing the socket takes it out of the epoll set.
        let Some(starting) = container.starting.take() else {
            return;
        };
        if outcome.is_ok() && container.poststart {
            let work = work::Hooks {
                which: LateHooks::Poststart,
                container_id: container.id.clone(),
                bundle: container.bundle.clone(),
                pid: container.pid,
            };
            let job = Job::Poststart {
                container: serial,
                replies: starting.replies.clone(),
            };
            if let Err(error) = self.help(work, job, 0) {
                self.stop_starting(
                    serial,
                    starting.replies,
                    &failed(FailKind::Other, error.to_string()),
                );
            }
            return;
        }
        for reply in starting.replies {
            match &outcome {
                Ok(()) => self.answer(reply, Done {}, Vec::new()),
                Err(failed) => self.answer(reply, failed.clone(), Vec::new()),
            }
        }
    }

    /// Ends the init of a start whose deadline has passed.
    pub(crate) fn start_late(&mut self, serial: u32, now_ns: u64) {
        let Some(container) = self.by_serial(serial) else {
            return;
        };
        let late = container
            .starting
            .take_if(|starting| starting.deadline_ns <= now_ns);
        let Some(starting) = late else { return };
        let text = "deadline passed while the container's program was to be executed";
        let late = Failed {
            step: "execute the program".to_owned(),
            ..failed(FailKind::Deadline, text)
        };
        self.stop_starting(serial, starting.replies, &late);
    }

    /// Takes note of a child's end.
    pub(crate) fn ended(&mut self, ended: Ended) {
        if let Some(container) = self
            .containers
            .iter()
            .find(|container| container.pid == ended.pid)
        {
            let serial = container.serial;
            self.init_ended(serial, ended.status);
        } else if let Some(index) = self.execs.iter().position(|exec| exec.pid == ended.pid) {
            let exec = self.execs.remove(index);
            self.tell(ExecExited {
                exec_id: exec.id,
                exit: exit_of(ended.status, false),
            });
        } else {
            self.remember_stranger(ended);
        }
    }

    fn init_ended(&mut self, serial: u32, status: Status) {
        // What it said of its start comes before its end.
        while self
            .by_serial(serial)
            .is_some_and(|container| container.start_is_decided())
        {
            self.go_on_starting(serial);
        }
        let Some(container) = self.by_serial(serial) else {
            return;
        };
        let exit = container.ended(status);
        let (id, starting) = (container.id.clone(), container.starting.take());
        let done = container.outputs.iter().all(Option::is_none);
        for reply in starting.map(|starting| starting.replies).unwrap_or_default() {
            self.answer(
                reply,
                failed(FailKind::State, "the container's init has ended"),
                Vec::new(),
            );
        }
        self.tell_of_loss(serial);
        if done {
            self.close_log(serial);
        }
        self.tell(Exited {
            container_id: id,
            exit,
        });
    }

    /// Takes over what a helper has made.
    fn made(&mut self, job: Job, made: Made, fds: Vec<OwnedFd>) -> Result<(), (Reply, Failed)> {
        let mut fds = fds.into_iter();
        match job {
            Job::Setup {
                reply,
                pod_id,
                pod_dir,
            } => {
                let pidfd = if made.pid == 0 { None } else { fds.next() };
                self.sandbox = Some(sandbox(
                    pod_id,
                    pod_dir,
                    made.pid,
                    pidfd,
                    made.namespaces.iter().zip(fds),
                ));
                let answer = self.described().unwrap_or_default();
                self.answer(reply, answer, Vec::new());
                Ok(())
            }
            Job::Create { reply, container } => {
                let (pidfd, terminal) = (fds.next(), fds.next());
                self.created(container, made, pidfd, terminal).map(|pidfd| {
                    let pid = self.by_serial(container).map_or(0, |container| container.pid);
                    self.answer(reply, Created { pid }, vec![pidfd]);
                    self.meet_stranger(pid);
                })
            }
            .map_err(|error| {
                let failed = crate::refusal::kernel("take over the container")(error);
                self.drop_container(container);
                (reply, failed)
            }),
            Job::Exec {
                reply,
                exec_id,
                container,
                tty,
            } => {
                let (pid, pidfd, terminal) = (made.pid, fds.next(), fds.next());
                let container_id = self
                    .by_serial(container)
                    .map(|one| one.id.clone())
                    .unwrap_or_default();
                let taken = self.executed(exec_id, container_id, pid, pidfd);
                let pidfd =
                    taken.map_err(|error| (reply, crate::refusal::kernel("take over the process")(error)))?;
                if !self.is_awaited(reply) {
                    // Nobody has its streams or waits for its end: and who connected meanwhile does not know of it.
                    let _ = pidfd::send_signal(&pidfd, Signal::KILL);
                }
                let fds = [Some(pidfd), terminal].into_iter().flatten().collect();
                self.answer(reply, ExecStarted { pid, tty }, fds);
                self.meet_stranger(pid);
                Ok(())
            }
            Job::Poststart { replies, .. } => {
                for reply in replies {
                    self.answer(reply, Done {}, Vec::new());
                }
                Ok(())
            }
            Job::Poststop { container } => {
                self.forgotten(container);
                Ok(())
            }
        }
    }

    fn helper_failed(&mut self, job: Job, failed: Failed) {
        match job {
            Job::Setup { reply, .. } | Job::Exec { reply, .. } => self.answer(reply, failed, Vec::new()),
            Job::Create { reply, container } => {
                self.drop_container(container);
                self.answer(reply, failed, Vec::new());
            }
            Job::Poststart { container, replies } => self.stop_starting(container, replies, &failed),
            Job::Poststop { container } => {
                // The hooks had their chance; a record that cannot be forgotten would help nobody.
                say(&format!("poststop hooks: {}", failed.message));
                self.forgotten(container);
            }
        }
    }

    /// A container whose init waits for its start; a descriptor of the init for the daemon.
    fn created(
        &mut self,
        serial: u32,
        made: Made,
        pidfd: Option<OwnedFd>,
        terminal: Option<OwnedFd>,
    ) -> coracle_kernel::Result<OwnedFd> {
        let gone = || coracle_kernel::Error::new("recvmsg", "pidfd", coracle_kernel::Errno::EBADF);
        let found = self
            .containers
            .iter_mut()
            .find(|container| container.serial == serial);
        let (Some(container), Some(pidfd)) = (found, pidfd) else {
            return Err(gone());
        };
        let copy = fd::dup(&pidfd)?;
        container.state = ContainerState::Created;
        container.pid = made.pid;
        container.poststart = made.poststart;
        container.poststop = made.poststop;
        container.cgroup = made.cgroup;
        self.epoll.add(&pidfd, Token::Init.with(serial), Interest::READ)?;
        container.pidfd = Some(pidfd);
        container.watch_oom();
        if let Some(oom) = &container.oom {
            self.epoll.add(oom, Token::Oom.with(serial), oom.interest())?;
        }
        if let Some(terminal) = terminal {
            self.epoll
                .add(&terminal, Token::Stdout.with(serial), Interest::READ)?;
            let [stdout, _] = &mut container.outputs;
            *stdout = Some(Output::new(terminal, true)?);
        }
        Ok(copy)
    }

    /// A process of an exec; a descriptor of it for the daemon.
    fn executed(
        &mut self,
        id: String,
        container_id: String,
        pid: i32,
        pidfd: Option<OwnedFd>,
    ) -> coracle_kernel::Result<OwnedFd> {
        let gone = || coracle_kernel::Error::new("recvmsg", "pidfd", coracle_kernel::Errno::EBADF);
        let pidfd = pidfd.ok_or_else(gone)?;
        let copy = fd::dup(&pidfd)?;
        let serial = self.next_serial();
        self.epoll.add(&pidfd, Token::Exec.with(serial), Interest::READ)?;
        self.execs.push(Exec {
            id,
            container_id,
            pid,
            pidfd,
        });
        Ok(copy)
    }

    /// If a process that we have just learnt of had ended before.
    fn meet_stranger(&mut self, pid: i32) {
        if let Some(exit) = self.take_stranger(pid) {
            self.ended(exit);
        }
    }

    /// Drops a container that did not come to be.
    fn drop_container(&mut self, serial: u32) {
        if let Some(index) = self
            .containers
            .iter()
            .position(|container| container.serial == serial)
        {
            let container = self.containers.remove(index);
            container.kill();
        }
    }

    /// Drops a container whose hooks have run.
    fn forgotten(&mut self, serial: u32) {
        let Some(index) = self
            .containers
            .iter()
            .position(|container| container.serial == serial)
        else {
            return;
        };
        let Container { forgetting, .. } = self.containers.remove(index);
        for reply in forgetting {
            self.answer(reply, Done {}, Vec::new());
        }
    }

    /// Stops a container that could not be started as it should, and says why.
    fn stop_starting(&mut self, serial: u32, replies: Vec<Reply>, failed: &Failed) {
        if let Some(container) = self.by_serial(serial) {
            container.kill();
        }
        for reply in replies {
            self.answer(reply, Body::from(failed.clone()), Vec::new());
        }
    }
}

/// The pod with the namespaces that a helper has made.
fn sandbox<'a>(
    pod_id: String,
    pod_dir: String,
    pid: i32,
    mut pidfd: Option<OwnedFd>,
    namespaces: impl Iterator<Item = (&'a String, OwnedFd)>,
) -> Sandbox {
    let mut sandbox = Sandbox {
        pod_id,
        pod_dir,
        ipc: None,
        uts: None,
        mnt: None,
        init: None,
    };
    for (kind, namespace) in namespaces {
        match kind.as_str() {
            "ipc" => sandbox.ipc = Some(namespace),
            "uts" => sandbox.uts = Some(namespace),
            "mnt" => sandbox.mnt = Some(namespace),
            _ => {
                sandbox.init = pidfd.take().map(|pidfd| PodInit {
                    pid,
                    pidfd,
                    namespace,
                });
            }
        }
    }
    sandbox
}

fn start_failure(error: &ContainerError) -> Failed {
    let mut said = failed(FailKind::State, error.to_string());
    if let ContainerError::Init(failure) = error {
        said.kind = FailKind::Other.into();
        said.step = failure.step.to_string();
        said.errno = failure.errno.map_or(0, coracle_kernel::Errno::raw);
        if failure.kind == FailureKind::Program {
            said.kind = FailKind::NoProgram.into();
        }
    }
    said
}
