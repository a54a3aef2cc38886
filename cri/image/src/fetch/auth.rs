//! Authentication to one registry server, without IO: challenges in, headers and token requests out.
//!
//! Sources: RFC 9110 §11 (challenges), the distribution project's token specification (bearer tokens).

use std::time::{Duration, Instant};

use super::protocol::Credentials;

/// Largest header of a challenge that is looked at.
const CHALLENGE_LIMIT_BYTES: usize = 4 << 10;

/// A token is renewed this long before it ends.
const MARGIN: Duration = Duration::from_secs(10);

/// One parsed challenge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password with every request.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// URL of the token server.
        realm: String,
        /// What the token is for.
        service: Option<String>,
        /// What it allows.
        scope: Option<String>,
        /// The registry said that the token sent is not good.
        invalid_token: bool,
    },
}

/// What to do about a 401.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Ask again with [`Authorizer::header`].
    Retry,
    /// Get a token first; give it to [`Authorizer::accept_token`].
    FetchToken(TokenRequest),
    /// Nothing helps.
    Denied(&'static str),
}

/// A request to a token server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TokenRequest {
    /// Full URL with query.
    pub(crate) url: String,
    /// `Authorization` of the request.
    pub(crate) authorization: Option<String>,
    /// A form to POST; GET without.
    pub(crate) form: Option<String>,
}

/// The state of authentication to one server.
pub(crate) struct Authorizer {
    credentials: Credentials,
    basic: bool,
    token: Option<(String, Instant)>,
    default_scope: String,
}

impl Authorizer {
    /// Starts anonymous, whatever the credentials: they are sent only to a server that asks.
    pub(crate) fn new(credentials: Credentials, repository: &str) -> Self {
        Self {
            credentials,
            basic: false,
            token: None,
            default_scope: format!("repository:{repository}:pull"),
        }
    }

    /// The `Authorization` header for the next request.
    pub(crate) fn header(&self, now: Instant) -> Option<String> {
        if let Some((token, end)) = &self.token
            && now < *end
        {
            return Some(format!("Bearer {token}"));
        }
        match &self.credentials {
            Credentials::Basic { username, password } if self.basic => Some(basic(username, password)),
            Credentials::Bearer(token) => Some(format!("Bearer {token}")),
            _ => None,
        }
    }

    /// Decides about a 401 that came for a request sent with `sent` as its header; `refusals` counts the 401s that
    /// this request has had before. Requests run side by side: what another one has learnt is used first.
    pub(crate) fn challenged(
        &mut self,
        challenges: &[Challenge],
        sent: Option<&str>,
        refusals: u32,
        now: Instant,
    ) -> Action {
        if refusals >= 2 {
            return Action::Denied("the registry refuses every authentication");
        }
        if self.header(now).is_some_and(|known| sent != Some(known.as_str())) {
            return Action::Retry;
        }
        let bearer = challenges.iter().find(|c| matches!(c, Challenge::Bearer { .. }));
        if let Some(Challenge::Bearer {
            realm,
            service,
            scope,
            invalid_token,
        }) = bearer
        {
            // A token that ended in between is renewed; a fresh one that is refused is a refusal.
            if refusals > 0 && sent.is_some() && !invalid_token {
                return Action::Denied("the registry refuses the token that its token server gave");
            }
            if matches!(self.credentials, Credentials::Bearer(_)) {
                return Action::Denied("the registry refuses the given token");
            }
            self.token = None;
            let scope = scope.as_deref().unwrap_or(&self.default_scope);
            return Action::FetchToken(self.token_request(realm, service.as_deref(), scope));
        }
        if challenges.contains(&Challenge::Basic) {
            if !matches!(self.credentials, Credentials::Basic { .. }) {
                return Action::Denied("the registry asks for a user name and a password");
            }
            if std::mem::replace(&mut self.basic, true) {
                return Action::Denied("the registry refuses the user name and password");
            }
            return Action::Retry;
        }
        Action::Denied("the registry refuses access and names no way to authenticate")
    }

    /// Takes a token server's answer.
    pub(crate) fn accept_token(&mut self, body: &[u8], now: Instant) -> Result<(), &'static str> {
        #[derive(serde::Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }
        let answer: Answer =
            serde_json::from_slice(body).map_err(|_| "the token server's answer is not a token")?;
        let token = answer
            .token
            .or(answer.access_token)
            .filter(|t| !t.is_empty())
            .ok_or("the token server gave no token")?;
        if !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err("the token server's token has characters that no token has");
        }
        let lives = Duration::from_secs(answer.expires_in.unwrap_or(60).clamp(20, 24 * 3600));
        self.token = Some((token, now + lives - MARGIN));
        Ok(())
    }

    fn token_request(&self, realm: &str, service: Option<&str>, scope: &str) -> TokenRequest {
        let mut query = format!("scope={}", escape(scope));
        if let Some(service) = service {
            query = format!("service={}&{query}", escape(service));
        }
        match &self.credentials {
            Credentials::Identity(token) => TokenRequest {
                url: realm.to_owned(),
                authorization: None,
                form: Some(format!(
                    "grant_type=refresh_token&client_id=coracle&refresh_token={}&{query}",
                    escape(token)
                )),
            },
            credentials => TokenRequest {
                url: format!("{realm}{}{query}", if realm.contains('?') { '&' } else { '?' }),
                authorization: match credentials {
                    Credentials::Basic { username, password } => Some(basic(username, password)),
                    _ => None,
                },
                form: None,
            },
        }
    }
}

/// Parses one `WWW-Authenticate` header; several challenges may stand in it. What is not understood is left out.
pub(crate) fn parse_challenges(header: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    if header.len() > CHALLENGE_LIMIT_BYTES {
        return found;
    }
    let mut rest = header.trim_start_matches([' ', ',']);
    while !rest.is_empty() {
        let end = rest.find([' ', ',']).unwrap_or(rest.len());
        let scheme = &rest[..end];
        rest = rest[end..].trim_start();
        let mut parameters = Vec::new();
        while let Some((name, value, after)) = parse_parameter(rest) {
            parameters.push((name.to_ascii_lowercase(), value));
            rest = after;
        }
        let mut take = |name: &str| {
            let at = parameters.iter().position(|(n, _)| n == name)?;
            Some(parameters.swap_remove(at).1)
        };
        if scheme.eq_ignore_ascii_case("basic") {
            found.push(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer")
            && let Some(realm) = take("realm")
        {
            let invalid_token = take("error").is_some_and(|e| e == "invalid_token");
            found.push(Challenge::Bearer {
                realm,
                service: take("service"),
                scope: take("scope"),
                invalid_token,
            });
        }
        let after = rest.trim_start_matches([' ', ',']);
        if after.len() == rest.len() && !rest.is_empty() && scheme.is_empty() {
            break;
        }
        rest = after;
    }
    found
}

/// `name=value` or `name="value"` with what follows it; `None` where the text is not a parameter.
fn parse_parameter(text: &str) -> Option<(&str, String, &str)> {
    let text = text.trim_start_matches([' ', ',']);
    let equals = text.find('=')?;
    let name = text[..equals].trim_end();
    if name.is_empty()
        || !name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    {
        return None;
    }
    let value = text[equals + 1..].trim_start();
    let Some(quoted) = value.strip_prefix('"') else {
        let end = value.find([',', ' ']).unwrap_or(value.len());
        return Some((name, value[..end].to_owned(), &value[end..]));
    };
    let mut out = String::new();
    let mut escaped = false;
    for (at, c) in quoted.char_indices() {
        match c {
            _ if escaped => {
                out.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return Some((name, out, &quoted[at + 1..])),
            _ => out.push(c),
        }
    }
    None
}

/// The value of an `Authorization` header for basic authentication.
fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", base64(format!("{username}:{password}").as_bytes()))
}

/// Standard alphabet, padded.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .fold(0_usize, |word, byte| (word << 8) | usize::from(*byte))
            << (8 * (3 - chunk.len()));
        for i in 0..4 {
            out.push(if i <= chunk.len() {
                char::from(ALPHABET[(word >> (18 - 6 * i)) & 63])
            } else {
                '='
            });
        }
    }
    out
}

/// Percent-encodes everything but unreserved characters (RFC 3986 §2.3).
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.into(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
            invalid_token: false,
        }
    }

    #[test]
    fn challenges_are_parsed() {
        assert_eq!(parse_challenges(r#"Basic realm="test""#), [Challenge::Basic]);
        assert_eq!(
            parse_challenges(
                r#"Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull""#
            ),
            [bearer(
                "https://auth.example/token",
                Some("reg"),
                Some("repository:a/b:pull")
            )]
        );
        assert_eq!(
            parse_challenges(r#"Negotiate, Bearer realm="https://a/t?x=1, 2" , scope=s, basic REALM=x"#),
            [bearer("https://a/t?x=1, 2", None, Some("s")), Challenge::Basic]
        );
        assert_eq!(parse_challenges(r#"Bearer scope="no realm""#), []);
        assert_eq!(parse_challenges(r#"Bearer realm="unfinished"#), []);
        assert_eq!(
            parse_challenges(&format!("Basic realm=\"{}\"", "x".repeat(5000))),
            []
        );
    }

    #[test]
    fn any_bytes_end_without_panic() {
        let mut seed = 7_u64;
        for _ in 0..20_000 {
            let text: String = (0..seed % 40)
                .map(|_| {
                    seed = seed
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let words = ["Bearer", " ", ",", "=", "\"", "realm", "é", "\\", "Basic", "x"];
                    words[usize::try_from(seed >> 33).unwrap_or(0) % words.len()]
                })
                .collect();
            seed = seed.wrapping_add(1);
            let _ = parse_challenges(&text);
        }
    }

    #[test]
    fn a_token_is_fetched_with_the_credentials_and_then_sent() {
        let now = Instant::now();
        let mut auth = Authorizer::new(
            Credentials::Basic {
                username: "u".into(),
                password: "p q".into(),
            },
            "x",
        );
        assert_eq!(auth.header(now), None);
        let challenge = [bearer("https://a/t", Some("reg istry"), None)];
        let Action::FetchToken(request) = auth.challenged(&challenge, None, 0, now) else {
            panic!()
        };
        assert_eq!(
            request.url,
            "https://a/t?service=reg%20istry&scope=repository%3Ax%3Apull"
        );
        assert_eq!(request.authorization.as_deref(), Some("Basic dTpwIHE="));
        auth.accept_token(br#"{"token":"abc","expires_in":300}"#, now)
            .unwrap();
        assert_eq!(auth.header(now).as_deref(), Some("Bearer abc"));
        assert_eq!(
            auth.challenged(&challenge, None, 0, now),
            Action::Retry,
            "another request has fetched it"
        );
        assert!(matches!(
            auth.challenged(&challenge, Some("Bearer abc"), 1, now),
            Action::Denied(_)
        ));
        let later = now + Duration::from_secs(299);
        assert_eq!(auth.header(later), None);
        assert!(matches!(
            auth.challenged(&challenge, Some("Bearer abc"), 0, later),
            Action::FetchToken(_)
        ));
    }

    #[test]
    fn basic_is_tried_once() {
        let now = Instant::now();
        let mut auth = Authorizer::new(
            Credentials::Basic {
                username: "pod".into(),
                password: "open sesame".into(),
            },
            "x",
        );
        assert_eq!(auth.challenged(&[Challenge::Basic], None, 0, now), Action::Retry);
        assert_eq!(auth.header(now).as_deref(), Some("Basic cG9kOm9wZW4gc2VzYW1l"));
        assert_eq!(
            auth.challenged(&[Challenge::Basic], None, 0, now),
            Action::Retry,
            "another request has learnt it"
        );
        assert!(matches!(
            auth.challenged(&[Challenge::Basic], auth.header(now).as_deref(), 1, now),
            Action::Denied(_)
        ));
        let mut anonymous = Authorizer::new(Credentials::Anonymous, "x");
        assert!(matches!(
            anonymous.challenged(&[Challenge::Basic], None, 0, now),
            Action::Denied(_)
        ));
    }

    #[test]
    fn an_identity_token_goes_by_post_and_bad_tokens_are_refused() {
        let now = Instant::now();
        let mut auth = Authorizer::new(Credentials::Identity("r/t".into()), "x");
        let challenge = [bearer("https://a/t", None, Some("s"))];
        let Action::FetchToken(request) = auth.challenged(&challenge, None, 0, now) else {
            panic!()
        };
        assert_eq!(
            request.form.as_deref(),
            Some("grant_type=refresh_token&client_id=coracle&refresh_token=r%2Ft&scope=s")
        );
        for bad in ["", "{}", r#"{"token":""}"#, "{\"token\":\"a\\nb\"}", "[]"] {
            assert_ne!(auth.accept_token(bad.as_bytes(), now), Ok(()), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let text = format!(
            "{:?}",
            Credentials::Basic {
                username: "u".into(),
                password: "hunter2".into()
            }
        );
        assert!(!text.contains("hunter2"), "{text}");
    }
}
