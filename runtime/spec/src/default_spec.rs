//! The templates that `spec` writes.

/// `config.json` for a container of root, indented by tabs.
#[must_use]
pub fn default_spec() -> &'static str {
    include_str!("default_spec/root.json")
}

/// `config.json` for a container of an ordinary user, who becomes root inside.
#[must_use]
pub fn rootless_spec(uid: u32, gid: u32) -> String {
    include_str!("default_spec/rootless.json")
        .replace("\"HOST_UID\"", &uid.to_string())
        .replace("\"HOST_GID\"", &gid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, IdMapping};
    use crate::namespaces::NamespaceKind;

    #[test]
    fn both_templates_pass_our_own_checks_without_a_warning() {
        let config = Config::from_slice(default_spec().as_bytes()).unwrap();
        assert_eq!(config.warnings, []);
        assert_eq!(config.process.args, ["sh"]);
        assert_eq!(config.mounts.len(), 7);
        assert!(config.namespaces.is_new(NamespaceKind::Network));

        let config = Config::from_slice(rootless_spec(1000, 1001).as_bytes()).unwrap();
        assert_eq!(config.warnings, []);
        assert_eq!(
            config.uid_mappings,
            [IdMapping {
                container_id: 0,
                host_id: 1000,
                size: 1
            }]
        );
        assert_eq!(
            config.gid_mappings,
            [IdMapping {
                container_id: 0,
                host_id: 1001,
                size: 1
            }]
        );
        assert!(!config.namespaces.contains(NamespaceKind::Network));
        assert!(config.namespaces.is_new(NamespaceKind::User));
        assert!(config.resources.is_none());
    }
}
