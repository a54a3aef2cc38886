//! From the clone to `execve`: the side that stays outside (`parent`, `outside`), the side that becomes the program
//! (`child`), the steps that it takes (`steps`), and the words between the two (`handshake`, `error`).

mod between;
mod child;
mod error;
mod handshake;
mod outside;
mod parent;
mod setup;
mod steps;
mod terminal;

pub use error::{Failure, Kind, Step};
pub(crate) use handshake::{Heard, Link, Order, Word};
pub use parent::{Console, LaunchError, Parent};
pub(crate) use parent::{Keep, Launch, Newborn, launch};
pub(crate) use setup::{Barrier, Filter, Init, Role, Setup};
