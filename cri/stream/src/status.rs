//! How a session's end is told to the client, on the error stream.

use serde::Serialize;

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The process exited with this code; 0 also for an attachment whose container has ended.
    Exit(i32),
    /// Something of ours failed.
    Failed(String),
}

impl Outcome {
    /// The `metav1.Status` of protocol v4 and later.
    pub(crate) fn status(&self) -> Vec<u8> {
        let status = match self {
            Outcome::Exit(0) => Status {
                status: "Success",
                ..Status::default()
            },
            Outcome::Exit(code) => Status {
                status: "Failure",
                message: self.text(),
                reason: "NonZeroExitCode",
                details: Some(Details {
                    causes: [Cause {
                        reason: "ExitCode",
                        message: code.to_string(),
                    }],
                }),
                code: 0,
            },
            Outcome::Failed(_) => Status {
                status: "Failure",
                message: self.text(),
                reason: "InternalError",
                details: None,
                code: 500,
            },
        };
        serde_json::to_vec(&status).expect("a struct of strings and numbers is always JSON")
    }

    /// What protocols before v4 write, and nothing on success.
    pub(crate) fn text(&self) -> String {
        match self {
            Outcome::Exit(0) => String::new(),
            Outcome::Exit(code) => {
                format!("command terminated with non-zero exit code: exit status {code}")
            }
            Outcome::Failed(why) => format!("Internal error occurred: {why}"),
        }
    }
}

#[derive(Default, Serialize)]
struct Status {
    status: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "is_zero")]
    code: u16,
}

#[derive(Serialize)]
struct Details {
    causes: [Cause; 1],
}

#[derive(Serialize)]
struct Cause {
    reason: &'static str,
    message: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(code: &u16) -> bool {
    *code == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(outcome: &Outcome) -> String {
        String::from_utf8(outcome.status()).unwrap()
    }

    #[test]
    fn statuses_are_those_that_kubectl_reads() {
        assert_eq!(json(&Outcome::Exit(0)), r#"{"status":"Success"}"#);
        assert_eq!(
            json(&Outcome::Exit(3)),
            concat!(
                r#"{"status":"Failure","message":"command terminated with non-zero exit code: exit status 3","#,
                r#""reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#
            )
        );
        assert_eq!(
            json(&Outcome::Failed("no \"such\" thing".to_owned())),
            concat!(
                r#"{"status":"Failure","message":"Internal error occurred: no \"such\" thing","#,
                r#""reason":"InternalError","code":500}"#
            )
        );
        assert_eq!(Outcome::Exit(0).text(), "");
    }
}
