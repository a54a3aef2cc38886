//! Where a cgroup is: the rules for `cgroupsPath`, and what a state file keeps of it.

use std::collections::BTreeMap;

use crate::{Error, Result};

/// Longest path taken; the kernel's own limit for a path.
const PATH_MAX: usize = 4096;
/// Longest directory name of the kernel.
const NAME_MAX: usize = 255;

/// The resolved place of a group: one path below the hierarchy's root, or on v1 one a hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// Clean, relative to the hierarchy's root, without a leading `/`; never empty.
    pub(crate) path: String,
    /// v1: hierarchies (by the name of their first controller) in which the path is another one, because it was
    /// given relative to the caller's own group, which differs between hierarchies.
    pub(crate) differing: BTreeMap<String, String>,
}

impl Location {
    /// The same absolute path in every hierarchy.
    pub fn absolute(path: &str) -> Result<Location> {
        Ok(Location {
            path: clean(path)?,
            differing: BTreeMap::new(),
        })
    }

    /// The path as people write it: `/kubepods/pod1/x`. On v1 that of hierarchies in which no other one is known.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/{}", self.path)
    }

    /// For a state file: controller to path, the common one under the empty name.
    #[must_use]
    pub fn to_map(&self) -> BTreeMap<String, String> {
        let mut map = BTreeMap::from([(String::new(), self.path())]);
        map.extend(
            self.differing
                .iter()
                .map(|(controller, path)| (controller.clone(), format!("/{path}"))),
        );
        map
    }

    /// Back from a state file; each path is checked again.
    pub fn from_map(map: &BTreeMap<String, String>) -> Result<Location> {
        let Some(common) = map.get("") else {
            return Err(Error::Path {
                path: String::new(),
                why: "there is none in the state",
            });
        };
        let mut location = Location::absolute(common)?;
        for (controller, path) in map.iter().filter(|(controller, _)| !controller.is_empty()) {
            location.differing.insert(controller.clone(), clean(path)?);
        }
        Ok(location)
    }

    /// The path in the hierarchy of `controller`.
    pub(crate) fn within(&self, controller: &str) -> &str {
        self.differing.get(controller).unwrap_or(&self.path)
    }

    /// The group `name` below this one.
    pub(crate) fn child(&self, name: &str) -> Result<Location> {
        if name.is_empty() || name == "." || name == ".." || name.contains('/') {
            return Err(refused(name, "a sub-group has one name"));
        }
        let mut child = Location::absolute(&format!("{}/{name}", self.path))?;
        for (controller, path) in &self.differing {
            child
                .differing
                .insert(controller.clone(), clean(&format!("{path}/{name}"))?);
        }
        Ok(child)
    }
}

/// Cleans a path by its letters alone: no empty and no `.` components, no leading `/`. What could leave its place
/// (`..`) or end early (NUL) is refused, not mended.
pub(crate) fn clean(path: &str) -> Result<String> {
    if path.len() > PATH_MAX {
        return Err(refused(path, "it is longer than 4096 bytes"));
    }
    if path.contains('\0') {
        return Err(refused(path, "it contains a NUL byte"));
    }
    if path.contains('\n') {
        // Such a name would forge lines of /proc/<pid>/cgroup; the kernel refuses it too.
        return Err(refused(path, "it contains a line break"));
    }
    let mut clean = String::with_capacity(path.len());
    for component in path
        .split('/')
        .filter(|component| !component.is_empty() && *component != ".")
    {
        if component == ".." {
            return Err(refused(path, "it contains \"..\""));
        }
        if component.len() > NAME_MAX {
            return Err(refused(path, "a component is longer than 255 bytes"));
        }
        if !clean.is_empty() {
            clean.push('/');
        }
        clean.push_str(component);
    }
    if clean.is_empty() {
        return Err(refused(path, "it names the root of the hierarchy"));
    }
    Ok(clean)
}

fn refused(path: &str, why: &'static str) -> Error {
    let mut short: String = path.chars().take(64).collect();
    if short.len() < path.len() {
        short.push('…');
    }
    Error::Path { path: short, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_by_their_letters() {
        for (given, expected) in [
            ("/kubepods/pod1/x", "kubepods/pod1/x"),
            ("a//b/./c/", "a/b/c"),
            ("x", "x"),
            ("/a..b/...", "a..b/..."),
        ] {
            assert_eq!(clean(given).unwrap(), expected, "{given}");
        }
    }

    #[test]
    fn what_could_leave_its_place_is_refused() {
        let long = "a/".repeat(2500);
        let wide = "a".repeat(256);
        for given in [
            "",
            "/",
            "./.",
            "..",
            "../x",
            "/a/../b",
            "a/..",
            "a\0b",
            "a\nb",
            long.as_str(),
            wide.as_str(),
        ] {
            assert!(matches!(clean(given), Err(Error::Path { .. })), "{given:?}");
        }
        let text = clean(&long).unwrap_err().to_string();
        assert!(text.len() < 200, "a long path is not repeated: {text}");
    }

    #[test]
    fn a_location_survives_a_state_file() {
        let mut location = Location::absolute("/a/b").unwrap();
        location
            .differing
            .insert("memory".to_owned(), "own/a/b".to_owned());
        let back = Location::from_map(&location.to_map()).unwrap();
        assert_eq!(back, location);
        assert_eq!(back.within("memory"), "own/a/b");
        assert_eq!(back.within("pids"), "a/b");
        assert_eq!(back.child("exec-1").unwrap().within("memory"), "own/a/b/exec-1");

        let hostile = BTreeMap::from([
            (String::new(), "/a".to_owned()),
            ("memory".to_owned(), "/../x".to_owned()),
        ]);
        Location::from_map(&hostile).unwrap_err();
        Location::from_map(&BTreeMap::new()).unwrap_err();
        location.child("../x").unwrap_err();
    }
}
