//! Generated types, clients and servers of the gRPC interfaces.
//!
//! Nothing is written here by hand: the definitions are `cri/v1/api.proto` (pinned) and
//! `admin/v1/admin.proto` (ours).

/// The Container Runtime Interface, package `runtime.v1`.
#[allow(
    rustdoc::bare_urls,
    rustdoc::invalid_html_tags,
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all
)]
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

/// The daemon's own interface, package `coracle.admin.v1`.
#[allow(
    rustdoc::bare_urls,
    rustdoc::invalid_html_tags,
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all
)]
pub mod admin {
    tonic::include_proto!("coracle.admin.v1");
}
