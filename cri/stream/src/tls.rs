//! What the server shows to clients that connect over TLS.

use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// A certificate and its key. TLS is 1.2 or 1.3; clients need no certificate, since who has a URL may use it.
#[derive(Clone)]
pub struct Tls(pub(crate) TlsAcceptor);

/// Why these cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Bytes that are no PEM, or of something else.
    #[error("certificate")]
    Certificate(#[source] pem::Error),
    /// The same of the key.
    #[error("private key")]
    Key(#[source] pem::Error),
    /// They are not understood, or do not belong to each other.
    #[error("certificate and private key")]
    Pair(#[from] rustls::Error),
}

impl Tls {
    /// From PEM: the server's certificate, then those that lead from it to its authority; and its private key.
    pub fn new(certificates: &[u8], key: &[u8]) -> Result<Tls, TlsError> {
        let chain = CertificateDer::pem_slice_iter(certificates).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(TlsError::Certificate)?;
        if chain.is_empty() {
            return Err(TlsError::Certificate(pem::Error::NoItemsFound));
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(TlsError::Key)?;
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        // each session is a connection, and nobody comes back to one
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(Tls(TlsAcceptor::from(Arc::new(config))))
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}
