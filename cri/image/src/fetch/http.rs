//! One registry server over HTTP: resolve, connect, authenticate, follow redirects. Runs in the fetch worker.

use std::collections::HashSet;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hickory_resolver::config::{NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::{Hosts, TokioResolver};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::auth::{Action, Authorizer, TokenRequest, parse_challenges};
use super::protocol::{Credentials, Endpoint, Failure, FailureKind, Scheme};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
const TOKEN_LIMIT_BYTES: usize = 1 << 20;
const REDIRECTS: u32 = 10;

/// One server, with its connections and its authentication.
pub(super) struct Server {
    endpoint: Endpoint,
    client: Client<HttpsConnector<HttpConnector<Dns>>, Full<Bytes>>,
    authorizer: Mutex<Authorizer>,
}

/// Names to addresses, from the resolv.conf and hosts that came on the socket.
#[derive(Clone)]
pub(super) struct Dns(Arc<TokioResolver>);

impl Server {
    /// Prepares to talk to a server; nothing is sent yet.
    pub(super) fn new(
        endpoint: Endpoint,
        repository: &str,
        credentials: Credentials,
        host_authorities: &str,
        dns: &Dns,
    ) -> Result<Self, Failure> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| Failure::new(FailureKind::Protocol, format!("set up TLS: {e}")))?
            .with_root_certificates(root_store(&endpoint, host_authorities)?)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new_with_resolver(dns.clone());
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_LIMIT));
        tcp.set_nodelay(true);
        let schemes = HttpsConnectorBuilder::new().with_tls_config(tls);
        let connector = match endpoint.scheme {
            Scheme::Https => schemes.https_only(),
            Scheme::Http => schemes.https_or_http(),
        };
        let client =
            Client::builder(TokioExecutor::new()).build(connector.enable_http1().wrap_connector(tcp));
        Ok(Self {
            endpoint,
            client,
            authorizer: Mutex::new(Authorizer::new(credentials, repository)),
        })
    }

    /// Whether the server may be asked what a tag means.
    pub(super) fn resolves_tags(&self) -> bool {
        self.endpoint.resolves_tags
    }

    /// GET of a path below the server's root; gives a 2xx answer or a failure that names the URL.
    pub(super) async fn get(&self, path: &str, headers: &HeaderMap) -> Result<Response<Incoming>, Failure> {
        let Endpoint {
            scheme,
            authority,
            namespace,
            ..
        } = &self.endpoint;
        let query = namespace
            .as_ref()
            .map(|ns| format!("?ns={ns}"))
            .unwrap_or_default();
        let url = format!("{scheme}://{authority}{path}{query}");
        let mut refusals = 0;
        loop {
            let authorization = self.lock().header(Instant::now());
            let (answer, same_origin) = self.follow(&url, headers, authorization.as_deref()).await?;
            if answer.status() != StatusCode::UNAUTHORIZED {
                return check_status(&url, answer).await;
            }
            // Its challenge would name where our credentials go.
            if !same_origin {
                let why = "the server that the registry redirects to wants credentials, and gets none";
                return Err(Failure::new(FailureKind::Denied, format!("{url}: {why}")));
            }
            let challenges: Vec<_> = answer
                .headers()
                .get_all(header::WWW_AUTHENTICATE)
                .iter()
                .filter_map(|value| value.to_str().ok())
                .flat_map(parse_challenges)
                .collect();
            let action =
                self.lock()
                    .challenged(&challenges, authorization.as_deref(), refusals, Instant::now());
            refusals += 1;
            match action {
                Action::Retry => {}
                Action::FetchToken(request) => self.fetch_token(request).await?,
                Action::Denied(why) => {
                    return Err(Failure::new(FailureKind::Denied, format!("{url}: {why}")));
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Authorizer> {
        self.authorizer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetch_token(&self, request: TokenRequest) -> Result<(), Failure> {
        let fail = |why: &dyn std::fmt::Display| {
            Failure::new(FailureKind::Denied, format!("token from {}: {why}", request.url))
        };
        let url: Uri = request.url.parse().map_err(|e| fail(&e))?;
        // Credentials never go over a plain connection but to a registry that is itself configured so.
        if url.scheme_str() != Some("https") && self.endpoint.scheme == Scheme::Https {
            return Err(fail(&"a token server must be asked over https"));
        }
        let mut builder = Request::builder()
            .uri(url)
            .header(header::ACCEPT, "application/json");
        if let Some(authorization) = &request.authorization {
            builder = builder.header(header::AUTHORIZATION, authorization);
        }
        let built = match request.form.clone() {
            Some(form) => builder
                .method(Method::POST)
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(Full::new(form.into())),
            None => builder.body(Full::default()),
        };
        let answer = self
            .send(built.map_err(|e| fail(&e))?)
            .await
            .map_err(|e| fail(&e))?;
        if !answer.status().is_success() {
            return Err(fail(&answer.status()));
        }
        let body = Limited::new(answer.into_body(), TOKEN_LIMIT_BYTES);
        let body = tokio::time::timeout(ANSWER_LIMIT, body.collect())
            .await
            .map_err(|e| fail(&e))?
            .map_err(|e| fail(&e))?;
        self.lock()
            .accept_token(&body.to_bytes(), Instant::now())
            .map_err(|e| fail(&e))
    }

    /// Sends a GET and follows redirects; the authorization goes to the first host alone. Whether the answer came from it.
    async fn follow(
        &self,
        url: &str,
        headers: &HeaderMap,
        authorization: Option<&str>,
    ) -> Result<(Response<Incoming>, bool), Failure> {
        let fail = |kind, why: &dyn std::fmt::Display| Failure::new(kind, format!("{url}: {why}"));
        let first: Uri = url.parse().map_err(|e| fail(FailureKind::Protocol, &e))?;
        let mut next = first.clone();
        for _ in 0..=REDIRECTS {
            let mut request = Request::new(Full::default());
            *request.uri_mut() = next.clone();
            *request.headers_mut() = headers.clone();
            request.headers_mut().insert(
                header::USER_AGENT,
                HeaderValue::from_static(concat!("coracle/", env!("CARGO_PKG_VERSION"))),
            );
            let same_origin = next.scheme() == first.scheme() && next.authority() == first.authority();
            if let Some(authorization) = authorization
                && same_origin
            {
                let mut value = HeaderValue::from_str(authorization).map_err(|_| {
                    fail(
                        FailureKind::Denied,
                        &"the credentials have characters that no header may have",
                    )
                })?;
                value.set_sensitive(true);
                request.headers_mut().insert(header::AUTHORIZATION, value);
            }
            let answer = self
                .send(request)
                .await
                .map_err(|e| fail(FailureKind::Unavailable, &e))?;
            if !answer.status().is_redirection() {
                return Ok((answer, same_origin));
            }
            let location = answer
                .headers()
                .get(header::LOCATION)
                .and_then(|v| v.to_str().ok())
                .unwrap_or_default();
            next = redirect(&next, location).map_err(|why| fail(FailureKind::Protocol, &why))?;
        }
        Err(fail(FailureKind::Protocol, &"more than ten redirects"))
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, String> {
        match tokio::time::timeout(ANSWER_LIMIT, self.client.request(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(chain(&error)),
            Err(_) => Err(format!("no answer within {ANSWER_LIMIT:?}")),
        }
    }
}

impl Dns {
    /// A resolver that reads no file: search domains, ndots, time-outs and TCP fall-back as resolv.conf says.
    pub(super) fn new(resolv_conf: &str, hosts: &str) -> Result<Self, Failure> {
        let fail = |why: &dyn std::fmt::Display| {
            Failure::new(FailureKind::Unavailable, format!("set up name resolution: {why}"))
        };
        let (config, options) =
            hickory_resolver::system_conf::parse_resolv_conf(resolv_conf).unwrap_or_else(|_| {
                // As the C library: without a name server the one on this host is asked.
                let local = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
                (
                    ResolverConfig::from_parts(None, Vec::new(), vec![local]),
                    ResolverOpts::default(),
                )
            });
        let mut static_hosts = Hosts::default();
        static_hosts
            .read_hosts_conf(hosts.as_bytes())
            .map_err(|e| fail(&e))?;
        let mut builder =
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options);
        // The host's own file is out of sight; what it says has come on the socket.
        builder.options_mut().use_hosts_file = hickory_resolver::config::ResolveHosts::Never;
        let mut resolver = builder.build().map_err(|e| fail(&e))?;
        resolver.set_hosts(Arc::new(static_hosts));
        Ok(Self(Arc::new(resolver)))
    }
}

impl tower_service::Service<Name> for Dns {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = hickory_resolver::net::NetError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let resolver = Arc::clone(&self.0);
        Box::pin(async move {
            let found = resolver.lookup_ip(name.as_str()).await?;
            let addresses: Vec<_> = found.iter().map(|ip| SocketAddr::new(ip, 0)).collect();
            Ok(addresses.into_iter())
        })
    }
}

fn root_store(endpoint: &Endpoint, host_authorities: &str) -> Result<rustls::RootCertStore, Failure> {
    let mut roots = rustls::RootCertStore::empty();
    // A host's bundle may hold a certificate that is not understood: the others still serve.
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(host_authorities.as_bytes()).flatten());
    for certificate in CertificateDer::pem_slice_iter(endpoint.authorities.as_bytes()) {
        certificate
            .map_err(|e| e.to_string())
            .and_then(|c| roots.add(c).map_err(|e| e.to_string()))
            .map_err(|e| {
                Failure::new(
                    FailureKind::Protocol,
                    format!("authority configured for {}: {e}", endpoint.authority),
                )
            })?;
    }
    Ok(roots)
}

/// A success as it is; anything else as a failure with the registry's own words (bounded).
async fn check_status(url: &str, answer: Response<Incoming>) -> Result<Response<Incoming>, Failure> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let kind = match status {
        StatusCode::NOT_FOUND => FailureKind::NotFound,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => FailureKind::Denied,
        StatusCode::TOO_MANY_REQUESTS => FailureKind::Unavailable,
        _ if status.is_server_error() => FailureKind::Unavailable,
        _ => FailureKind::Protocol,
    };
    let body = tokio::time::timeout(
        Duration::from_secs(5),
        Limited::new(answer.into_body(), 4096).collect(),
    )
    .await;
    let words = match body {
        Ok(Ok(body)) => String::from_utf8_lossy(&body.to_bytes())
            .trim()
            .chars()
            .filter(|c| !c.is_control())
            .take(512)
            .collect(),
        _ => String::new(),
    };
    Err(Failure::new(kind, format!("{url}: {status} {words}").trim_end()))
}

/// Where a redirect leads; never from TLS to plain, never to another protocol.
fn redirect(from: &Uri, location: &str) -> Result<Uri, String> {
    let to = if location.starts_with('/') && !location.starts_with("//") {
        let mut parts = from.clone().into_parts();
        parts.path_and_query = Some(
            location
                .parse()
                .map_err(|e| format!("redirect to {location:?}: {e}"))?,
        );
        Uri::from_parts(parts).map_err(|e| format!("redirect to {location:?}: {e}"))?
    } else {
        location
            .parse::<Uri>()
            .map_err(|e| format!("redirect to {location:?}: {e}"))?
    };
    match (from.scheme_str(), to.scheme_str()) {
        (_, Some("https")) | (Some("http"), Some("http")) => Ok(to),
        _ => Err(format!("redirect to {location:?} is refused")),
    }
}

/// An error with its sources, in one line, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut seen = HashSet::from([text.clone()]);
    let mut source = error.source();
    while let Some(inner) = source {
        let words = inner.to_string();
        if seen.insert(words.clone()) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_never_leave_tls() {
        let from: Uri = "https://a.example/v2/x".parse().unwrap();
        assert_eq!(redirect(&from, "/y?z=1").unwrap(), "https://a.example/y?z=1");
        assert_eq!(
            redirect(&from, "https://b.example/").unwrap(),
            "https://b.example/"
        );
        for bad in [
            "http://a.example/",
            "file:///etc/passwd",
            "",
            "//c.example/x",
            "ftp://x/",
            "nonsense",
        ] {
            assert!(redirect(&from, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_of_the_hosts_file_resolve_without_a_server() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut dns = Dns::new("nameserver 127.0.0.1\n", "192.0.2.7 registry.test\n").unwrap();
            let name: Name = "registry.test".parse().unwrap();
            let found: Vec<_> = tower_service::Service::call(&mut dns, name)
                .await
                .unwrap()
                .collect();
            assert_eq!(found, ["192.0.2.7:0".parse().unwrap()]);
        });
    }
}
