//! Black-box suite for OCI runtimes.
//!
//! The files under `tests/` drive whatever program `RUNTIME` names through its command line and look at what comes
//! out: exit codes, texts, the state document, and what a process finds inside its container. A test has to pass on
//! runc first; one that fails there is a wrong test, unless it says in writing why runc differs ([`skip_on`]).
//!
//! | variable | meaning |
//! | --- | --- |
//! | `RUNTIME` | the runtime to test (required) |
//! | `CORACLE_TEST_DIR` | where bundles are made; default the system's temporary directory |
//! | `CORACLE_TEST_PROBE` | the helper program, already built (a guest has no compiler) |
//! | `CORACLE_TEST_SLOW` | all deadlines are multiplied by this |
//! | `CORACLE_TEST_SKIPS` | file to which each skipped test appends a line |
//!
//! Every container of the suite carries a mark of its own (its id) in its directory, environment and cgroup. When a
//! [`Container`] is dropped it is deleted, and whatever still carries the mark then is a leak and fails the test.

pub mod adversary;
pub mod bundle;
pub mod console;
pub mod container;
pub mod host;
pub mod leaks;
pub mod runner;

pub use bundle::Bundle;
pub use console::Console;
pub use container::Container;
pub use host::{skip_on, skip_unless, wait_for};
pub use runner::{Output, Runtime};
pub use serde_json::{Value, json};
