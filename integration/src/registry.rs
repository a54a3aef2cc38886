//! A TLS registry with a password, in a cell: Debian's docker-registry, filled with skopeo.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cell::{Cell, Process, run, wait_for};

/// User and password that the registry wants.
pub const CREDENTIALS: (&str, &str) = ("pod", "open sesame");

/// A running registry on the cell's loopback.
pub struct Registry {
    process: Process,
    certificates: PathBuf,
}

impl Registry {
    /// Host and port, as in a reference.
    pub const ADDRESS: &str = "127.0.0.1:5000";

    /// Starts a registry with a certificate of its own authority and basic authentication.
    pub fn start(cell: &Cell) -> Result<Self> {
        let dir = cell.subdir("registry")?;
        let certificates = cell.subdir("registry/certs")?;
        make_certificates(&certificates)?;
        let (user, password) = CREDENTIALS;
        let hash = run(Command::new("htpasswd").args(["-Bbn", user, password]))?;
        fs::write(dir.join("htpasswd"), hash)?;
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {root}/data}}, delete: {{enabled: true}}}}\n\
             http: {{addr: {address}, tls: {{certificate: {certs}/server.crt, key: {certs}/server.key}}}}\n\
             auth: {{htpasswd: {{realm: test, path: {root}/htpasswd}}}}\n",
            root = dir.display(),
            address = Self::ADDRESS,
            certs = certificates.display(),
        );
        fs::write(dir.join("config.yml"), config)?;
        let mut command = cell.command("docker-registry");
        command.arg("serve").arg(dir.join("config.yml"));
        let process = cell.spawn("registry", &mut command)?;
        let registry = Self {
            process,
            certificates,
        };
        wait_for("the registry", Duration::from_secs(20), || {
            cell.sh(&format!(
                "curl -s -o /dev/null --cacert {} https://{}/",
                registry.authority().display(),
                Self::ADDRESS
            ))
            .map(Some)
        })?;
        Ok(registry)
    }

    /// The certificate of the authority that signed the server's.
    pub fn authority(&self) -> PathBuf {
        self.certificates.join("ca.crt")
    }

    /// Pushes an OCI layout as `<address>/<name>`; gives the full reference.
    pub fn push(&self, cell: &Cell, layout: &Path, name: &str) -> Result<String> {
        let reference = format!("{}/{name}", Self::ADDRESS);
        let (user, password) = CREDENTIALS;
        let mut command = cell.command("skopeo");
        command
            .args(["--insecure-policy", "copy", "-q", "--dest-cert-dir"])
            .arg(self.certificates.join("client"))
            .arg(format!("--dest-creds={user}:{password}"))
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{reference}"));
        run(&mut command).with_context(|| format!("push {reference}"))?;
        Ok(reference)
    }

    /// Ends the registry.
    pub fn stop(self) -> Result<()> {
        self.process.kill()
    }
}

/// `ca.crt`, `server.crt`, `server.key`, and `client/ca.crt` for tools that want a directory.
fn make_certificates(dir: &Path) -> Result<()> {
    let script = r#"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test-ca -keyout ca.key -out ca.crt
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=registry -keyout server.key -out server.csr
printf 'subjectAltName=IP:127.0.0.1,DNS:registry.test\nbasicConstraints=CA:FALSE\n' >ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.crt
mkdir client; cp ca.crt client/
"#;
    run(Command::new("sh")
        .args(["-euc", script])
        .current_dir(dir)
        .env("LC_ALL", "C"))?;
    Ok(())
}
