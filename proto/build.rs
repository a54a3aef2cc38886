//! Protocol definitions to Rust, without protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    for (file, folder) in [("api.proto", "cri/v1"), ("admin.proto", "admin/v1")] {
        println!("cargo::rerun-if-changed={folder}/{file}");
        let descriptors = protox::compile([file], [folder])?;
        // Default stubs stay off: a new RPC in a newer pinned file must break the build.
        tonic_prost_build::configure()
            .bytes(".coracle.admin.v1.ImportImageRequest")
            // Ordered maps: the same message always has the same bytes, so that a request can be hashed.
            .btree_map(".")
            .compile_fds(descriptors)?;
    }
    Ok(())
}
