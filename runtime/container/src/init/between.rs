//! The process between the parent and the init, where one clone is not enough: see
//! [`crate::namespaces::Plan::needs_two_clones`] for when and why.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};

use coracle_kernel::clone::{Child, Clone3, own_pid};
use coracle_kernel::namespace::{self, Kinds};
use coracle_kernel::procfs::Procfs;
use coracle_kernel::{creds, fd, sched, time};

use super::error::{At, Failure, Step};
use super::handshake::{Link, Word};
use super::setup::{Role, Setup};
use super::{child, steps};
use crate::rootfs;

/// The process between: joins what must be joined before the init is made, and makes it as its own sibling.
pub(super) fn run(setup: Setup<'_>, role: Role<'_>, link: Link, cgroup: Option<&OwnedFd>) -> i32 {
    let link = Cell::new(Some(link));
    let outcome = make_second(setup, role, &link, cgroup);
    let Some(link) = link.take() else { return 1 };
    // Where even this fails, the other side is gone.
    let said = match outcome {
        Ok(init) => link.pass(&Word::Cloned, init.pidfd.as_fd()),
        Err(failure) => link.say(&Word::Failed(failure)),
    };
    i32::from(said.is_err())
}

/// `link` is taken only in the clone, whose copy of it is its own.
fn make_second(
    mut setup: Setup<'_>,
    mut role: Role<'_>,
    link: &Cell<Option<Link>>,
    cgroup: Option<&OwnedFd>,
) -> Result<Child, Failure> {
    let mut cgroup = cgroup.map(fd::dup).transpose().at(Step::Descriptors)?;
    if let (Role::Exec, Some(affinity)) = (&role, &setup.process.exec_cpu_affinity)
        && !affinity.initial.is_empty()
    {
        sched::set_affinity(0, &steps::cpu_mask(&affinity.initial)).at(Step::Affinity)?;
    }
    if let Role::Exec = role {
        // By inheritance its child is in it too.
        steps::enter_cgroup(&mut setup)?;
    }
    if let Role::Init(init) = &mut role
        && setup.namespaces.gathers
        && let Some(context) = &mut init.rootfs
    {
        // As long as we are the host's root: what is locked here stays so.
        rootfs::gather(init.config, context).at(Step::Rootfs)?;
    }
    setup.namespaces.join().at(Step::JoinNamespaces)?;
    if let Role::Init(init) = &role
        && setup.namespaces.new.contains(Kinds::TIME)
    {
        // Nobody may be in it yet when its offsets are written, and we enter it only by our child.
        namespace::unshare(Kinds::TIME).at(Step::CreateNamespaces)?;
        if let Some(offsets) = init.time_offsets {
            let procfs = Procfs::visible().at(Step::CreateNamespaces)?;
            time::write_offsets(&procfs, own_pid(), offsets).at(Step::CreateNamespaces)?;
        }
    }
    if let Role::Exec = role {
        // Our child is born where others may look at it: they must not be allowed to, whoever called us, and find nothing of
        // the host's among our descriptors.
        creds::set_dumpable(false).at(Step::Descriptors)?;
        let (kept, group) = steps::shed(&mut setup, link.take(), cgroup.take())?;
        link.set(kept);
        cgroup = group;
    }
    let clone = Clone3 {
        namespaces: setup.namespaces.clone_flags(),
        sibling: true,
        cgroup: cgroup.as_ref().map(AsFd::as_fd),
    };
    clone
        .spawn(|| match link.take() {
            Some(link) => child::run(setup, role, link),
            None => 1,
        })
        .at(Step::CreateNamespaces)
}
