//! Where pods and containers are found: by id, by short id, by identity.
//!
//! The one map that all pods share. Its lock is held for look-ups and insertions alone, never across I/O or an
//! await.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::{Error, Result};
use crate::ident::PodIdentity;
use crate::pod::PodHandle;
use crate::view::PodView;

/// All pods of this daemon.
#[derive(Debug, Default)]
pub(crate) struct Registry(RwLock<Maps>);

#[derive(Debug, Default)]
struct Maps {
    pods: BTreeMap<String, PodHandle>,
    /// Container id to the id of its pod.
    containers: BTreeMap<String, String>,
    identities: BTreeMap<PodIdentity, String>,
}

impl Registry {
    /// The pod of a full or short id.
    pub(crate) fn pod(&self, id: &str) -> Result<PodHandle> {
        let maps = self.read();
        by_prefix("pod sandbox", &maps.pods, id).map(|(_, pod)| pod.clone())
    }

    /// Full container id and pod of a full or short container id.
    pub(crate) fn container(&self, id: &str) -> Result<(String, PodHandle)> {
        let maps = self.read();
        let (full, pod) = by_prefix("container", &maps.containers, id)?;
        let handle = maps.pods.get(pod).ok_or_else(|| not_found("container", id))?;
        Ok((full.clone(), handle.clone()))
    }

    /// The pod that has this identity.
    pub(crate) fn identity(&self, identity: &PodIdentity) -> Option<PodHandle> {
        let maps = self.read();
        maps.pods.get(maps.identities.get(identity)?).cloned()
    }

    /// Enters a pod unless another one has its identity; then that one is returned.
    pub(crate) fn insert(&self, id: &str, identity: PodIdentity, pod: PodHandle) -> Result<(), PodHandle> {
        let mut maps = self.write();
        if let Some(other) = maps
            .identities
            .get(&identity)
            .and_then(|other| maps.pods.get(other))
        {
            return Err(other.clone());
        }
        maps.identities.insert(identity, id.to_owned());
        maps.pods.insert(id.to_owned(), pod);
        Ok(())
    }

    /// Enters a pod that no request can find by identity: one that is being removed.
    pub(crate) fn insert_nameless(&self, id: &str, pod: PodHandle) {
        self.write().pods.insert(id.to_owned(), pod);
    }

    pub(crate) fn remove(&self, id: &str) {
        let mut maps = self.write();
        maps.pods.remove(id);
        maps.identities.retain(|_, pod| pod != id);
        maps.containers.retain(|_, pod| pod != id);
    }

    pub(crate) fn insert_container(&self, id: &str, pod: &str) {
        self.write().containers.insert(id.to_owned(), pod.to_owned());
    }

    pub(crate) fn remove_container(&self, id: &str) {
        self.write().containers.remove(id);
    }

    pub(crate) fn pods(&self) -> Vec<PodHandle> {
        self.read().pods.values().cloned().collect()
    }

    /// The present snapshot of every pod.
    pub(crate) fn views(&self) -> Vec<Arc<PodView>> {
        self.read().pods.values().map(PodHandle::view).collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Maps> {
        // A panic under the lock leaves whole maps behind: each change is one insertion or removal.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Maps> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one entry whose key is `id` or begins with it.
fn by_prefix<'m, V>(
    what: &'static str,
    map: &'m BTreeMap<String, V>,
    id: &str,
) -> Result<(&'m String, &'m V)> {
    if id.is_empty() {
        return Err(not_found(what, id));
    }
    let mut found = map
        .range(id.to_owned()..)
        .take_while(|(key, _)| key.starts_with(id));
    match (found.next(), found.next()) {
        (None, _) => Err(not_found(what, id)),
        (Some(entry), None) => Ok(entry),
        (Some(entry), Some(_)) if entry.0 == id => Ok(entry),
        (Some(_), Some(_)) => Err(Error::Ambiguous {
            what,
            id: id.to_owned(),
        }),
    }
}

fn not_found(what: &'static str, id: &str) -> Error {
    Error::NotFound {
        what,
        id: id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_id_finds_the_only_one_that_begins_so() {
        let map: BTreeMap<String, u8> = [
            ("abc".into(), 1),
            ("abd".into(), 2),
            ("b".into(), 3),
            ("bc".into(), 4),
        ]
        .into();
        assert_eq!(by_prefix("container", &map, "abc").unwrap().1, &1);
        assert_eq!(by_prefix("container", &map, "b").unwrap().1, &3);
        assert_eq!(by_prefix("container", &map, "bc").unwrap().1, &4);
        assert!(matches!(
            by_prefix("container", &map, "ab"),
            Err(Error::Ambiguous { .. })
        ));
        for absent in ["", "x", "abcd"] {
            assert!(
                matches!(by_prefix("container", &map, absent), Err(Error::NotFound { .. })),
                "{absent}"
            );
        }
    }
}
