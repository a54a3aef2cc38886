//! What people do with kubectl in running containers.

use crate::Case;

pub(crate) const ALL: &[Case] = &[];
