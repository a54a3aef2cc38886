//! What goes wrong with CNI.

use std::path::PathBuf;
use std::time::Duration;

use coracle_kernel::Error as KernelError;

use super::ConfError;

/// Failure of a CNI operation.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// A configuration that cannot be one.
    #[error("CNI configuration {place}")]
    Conf {
        /// The file, or whose record.
        place: String,
        /// What is wrong with it.
        #[source]
        source: ConfError,
    },
    /// A template that cannot be filled in.
    #[error("CNI template {place}: {why}")]
    Template {
        /// The file.
        place: String,
        /// What is wrong with it.
        why: String,
    },
    /// Something of the request that cannot be passed on.
    #[error("{name} {why}")]
    Argument {
        /// Its name.
        name: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// There is no such plugin.
    #[error("CNI plugin {plugin:?} is not in {dirs}: install it there, or set [network] cni_bin_dirs")]
    Missing {
        /// Its name.
        plugin: String,
        /// Where it was looked for.
        dirs: String,
    },
    /// A plugin that could not be run.
    #[error("run CNI plugin {plugin}")]
    Run {
        /// Its name.
        plugin: String,
        /// The refusal.
        #[source]
        source: KernelError,
    },
    /// A plugin that said no.
    #[error("CNI plugin {plugin} refused {command} with code {code}: {words}")]
    Refused {
        /// Its name.
        plugin: String,
        /// What it was asked for.
        command: &'static str,
        /// Its code.
        code: u64,
        /// Its message and details.
        words: String,
    },
    /// A plugin that failed without saying why in the proper form.
    #[error("CNI plugin {plugin} {how} at {command}, and said {said:?}")]
    Died {
        /// Its name.
        plugin: String,
        /// What it was asked for.
        command: &'static str,
        /// How it ended.
        how: String,
        /// The end of what it wrote to standard error.
        said: String,
    },
    /// A plugin that took too long.
    #[error("CNI plugin {plugin} did not end {command} within {limit:?} and was killed")]
    Late {
        /// Its name.
        plugin: String,
        /// What it was asked for.
        command: &'static str,
        /// The time of the operation, of all plugins together.
        limit: Duration,
    },
    /// A plugin that answered too much.
    #[error("CNI plugin {plugin} answered more than 1 MiB to {command} and was killed")]
    TooMuch {
        /// Its name.
        plugin: String,
        /// What it was asked for.
        command: &'static str,
    },
    /// A plugin whose answer is none.
    #[error("CNI plugin {plugin} answered what is no result: {why}")]
    Rubbish {
        /// Its name.
        plugin: String,
        /// What is wrong with it.
        why: String,
    },
    /// The plugins gave no address.
    #[error("CNI network {network} gave the pod no address on {interface}")]
    NoAddress {
        /// The network's name.
        network: String,
        /// The pod's interface.
        interface: String,
    },
    /// Something of the files that this part keeps or makes.
    #[error("{step} {path:?}")]
    File {
        /// What was being done, a verb.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The failure.
        #[source]
        source: std::io::Error,
    },
}
