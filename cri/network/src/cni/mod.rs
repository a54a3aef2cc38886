//! Pods connected by CNI plugins.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Settings of CNI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniConfig {
    /// Where network configurations are.
    pub conf_dir: PathBuf,
    /// Where plugins are looked for, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// How long the plugins of one pod may take for one operation, all together.
    pub timeout: Duration,
}

/// What taking a pod down by CNI needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniRecord {
    /// The configuration list that the pod was connected with.
    pub conf: String,
}
