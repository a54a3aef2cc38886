//! The `process` object: program, place, user, privileges.

use serde_json::{Value, json};

use super::error::{Result, inside, invalid};
use super::user::Ids;
use super::{ImageProcess, Inputs, capabilities, env, security};
use coracle_proto::cri::{ContainerConfig, LinuxContainerSecurityContext};

/// The whole object.
pub(super) fn process(
    inputs: &Inputs<'_>,
    context: &LinuxContainerSecurityContext,
    sets: &capabilities::Sets,
    ids: &Ids,
) -> Result<Value> {
    let mut process = json!({
        "terminal": inputs.container.tty,
        "user": { "uid": ids.uid, "gid": ids.gid, "additionalGids": ids.groups },
        "args": args(inputs.container, inputs.image)?,
        "env": env::env(inputs.container, inputs.pod, inputs.image, inputs.host, inputs.namespaces.uts.is_some())?,
        "cwd": cwd(inputs.container, inputs.image)?,
        "capabilities": capabilities::document(*sets),
        "noNewPrivileges": context.no_new_privs,
        "oomScoreAdj": oom_score_adj(inputs.container)?,
    });
    if let Some(profile) = security::apparmor(context)? {
        process["apparmorProfile"] = json!(profile);
    }
    Ok(process)
}

/// The process of an exec: the container's own, with another command and no terminal. What the container was made
/// with holds for it too, whatever happened to the image or the request since.
///
/// # Errors
/// The command cannot be run, or the stored config holds no process.
pub fn exec_process(
    config: &Value,
    command: &[String],
    terminal: bool,
) -> std::result::Result<Value, super::SpecError> {
    check_args("cmd", command)?;
    let mut process = config
        .get("process")
        .filter(|process| process.is_object())
        .cloned()
        .ok_or_else(|| invalid("stored config", "has no process"))?;
    process["args"] = json!(command);
    process["terminal"] = json!(terminal);
    if let Some(members) = process.as_object_mut() {
        members.remove("consoleSize");
    }
    // Programs that draw ask for it; a container without a terminal was not given one.
    if terminal
        && let Some(env) = process.get_mut("env").and_then(Value::as_array_mut)
        && !env
            .iter()
            .any(|entry| entry.as_str().is_some_and(|entry| entry.starts_with("TERM=")))
    {
        env.push(json!("TERM=xterm"));
    }
    Ok(process)
}

/// The command replaces the image's entrypoint and drops its arguments, arguments replace arguments.
fn args(container: &ContainerConfig, image: &ImageProcess) -> Result<Vec<String>> {
    let (program, field) = if container.command.is_empty() {
        (&image.entrypoint, "image.config.entrypoint")
    } else {
        (&container.command, "config.command")
    };
    check_text(field, program)?;
    let rest = if !container.args.is_empty() || !container.command.is_empty() {
        check_text("config.args", &container.args)?;
        &container.args
    } else {
        check_text("image.config.cmd", &image.cmd)?;
        &image.cmd
    };
    let args: Vec<String> = program.iter().chain(rest).cloned().collect();
    check_args("config.command", &args)?;
    Ok(args)
}

fn check_args(field: &str, args: &[String]) -> Result<()> {
    check_text(field, args)?;
    match args.first().map(String::as_str) {
        None => Err(invalid(field, "is empty, and the image names no program either")),
        Some("") => Err(invalid(field, "begins with an empty word")),
        Some(_) => Ok(()),
    }
}

fn check_text(field: &str, words: &[String]) -> Result<()> {
    match words.iter().position(|word| word.contains('\0')) {
        Some(i) => Err(invalid(format!("{field}[{i}]"), "holds a NUL byte")),
        None => Ok(()),
    }
}

fn cwd(container: &ContainerConfig, image: &ImageProcess) -> Result<String> {
    if !container.working_dir.is_empty() {
        return inside("config.working_dir", &container.working_dir);
    }
    if !image.working_dir.is_empty() {
        return inside("image.config.working_dir", &image.working_dir);
    }
    Ok("/".to_owned())
}

/// Always set: one that says nothing would inherit the daemon's own protection.
fn oom_score_adj(container: &ContainerConfig) -> Result<i64> {
    let resources = container
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref());
    let score = resources.map_or(0, |resources| resources.oom_score_adj);
    if !(-1000..=1000).contains(&score) {
        let field = "config.linux.resources.oom_score_adj";
        return Err(invalid(field, format!("{score} is not between -1000 and 1000")));
    }
    Ok(score)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn args_of(command: &[&str], own: &[&str], entrypoint: &[&str], cmd: &[&str]) -> Result<Vec<String>> {
        let container = ContainerConfig {
            command: words(command),
            args: words(own),
            ..Default::default()
        };
        let image = ImageProcess {
            entrypoint: words(entrypoint),
            cmd: words(cmd),
            ..Default::default()
        };
        args(&container, &image)
    }

    #[test]
    fn a_command_drops_the_images_arguments() {
        assert_eq!(args_of(&[], &[], &["e"], &["c"]).unwrap(), ["e", "c"]);
        assert_eq!(args_of(&[], &["a"], &["e"], &["c"]).unwrap(), ["e", "a"]);
        assert_eq!(args_of(&["x"], &[], &["e"], &["c"]).unwrap(), ["x"]);
        assert_eq!(args_of(&["x"], &["a"], &["e"], &["c"]).unwrap(), ["x", "a"]);
        assert_eq!(args_of(&[], &[], &[], &["c", ""]).unwrap(), ["c", ""]);
    }

    #[test]
    fn a_program_must_be_named() {
        for bad in [
            args_of(&[], &[], &[], &[]),
            args_of(&[""], &[], &["e"], &[]),
            args_of(&["x\0y"], &[], &[], &[]),
            args_of(&["x"], &["\0"], &[], &[]),
            args_of(&[], &[], &["e"], &["c\0"]),
        ] {
            bad.unwrap_err();
        }
    }

    #[test]
    fn the_working_directory_is_absolute_and_plain() {
        let of = |request: &str, image: &str| {
            let container = ContainerConfig {
                working_dir: request.into(),
                ..Default::default()
            };
            let image = ImageProcess {
                working_dir: image.into(),
                ..Default::default()
            };
            cwd(&container, &image)
        };
        assert_eq!(of("", "").unwrap(), "/");
        assert_eq!(of("", "/srv//app/").unwrap(), "/srv/app");
        assert_eq!(of("/tmp", "relative").unwrap(), "/tmp");
        for bad in ["relative", "/\0"] {
            assert!(of(bad, "").is_err(), "{bad:?}");
            assert!(of("", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_exec_is_the_container_with_another_command() {
        let stored = json!({
            "process": {
                "args": ["sleep"], "terminal": true, "consoleSize": { "height": 1, "width": 1 }, "cwd": "/srv",
                "user": { "uid": 7, "gid": 8 }, "capabilities": { "bounding": ["CAP_KILL"] }, "noNewPrivileges": true,
            },
            "linux": {},
        });
        let made = exec_process(&stored, &words(&["ls", "-l"]), false).unwrap();
        let expected = json!({
            "args": ["ls", "-l"], "terminal": false, "cwd": "/srv", "user": { "uid": 7, "gid": 8 },
            "capabilities": { "bounding": ["CAP_KILL"] }, "noNewPrivileges": true,
        });
        assert_eq!(made, expected);
        // With a terminal there is a TERM, the container's own if it has one.
        let mut stored = stored;
        for (env, expected) in [
            (json!(["A=b"]), json!(["A=b", "TERM=xterm"])),
            (json!(["TERM=vt100"]), json!(["TERM=vt100"])),
        ] {
            stored["process"]["env"] = env;
            let made = exec_process(&stored, &words(&["top"]), true).unwrap();
            assert_eq!((&made["env"], &made["terminal"]), (&expected, &json!(true)));
        }
        for bad in [words(&[]), words(&[""]), words(&["a\0"])] {
            exec_process(&stored, &bad, false).unwrap_err();
        }
        for broken in [json!({}), json!({ "process": 1 }), json!([])] {
            exec_process(&broken, &words(&["ls"]), false).unwrap_err();
        }
    }
}
