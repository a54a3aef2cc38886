//! The environment of a process, and what it decides: the home directory and the search for the program.

use std::ffi::CString;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use coracle_kernel::Errno;
use coracle_kernel::exec::may_execute;
use coracle_kernel::path::{self, Kind, OFlags, Root};

/// Largest `/etc/passwd` that is read.
const MAX_PASSWD_BYTES: usize = 4 << 20;

/// The entries of a configuration, of several with one name only the last, at the place of the first.
pub(crate) fn unique(entries: &[String]) -> Vec<&str> {
    let mut unique: Vec<&str> = Vec::with_capacity(entries.len());
    for entry in entries {
        match unique.iter_mut().find(|known| name(known) == name(entry)) {
            Some(known) => *known = entry,
            None => unique.push(entry),
        }
    }
    unique
}

/// The value of a name.
pub(crate) fn value<'a>(entries: &[&'a str], wanted: &str) -> Option<&'a str> {
    let entry = entries.iter().find(|entry| name(entry) == wanted)?;
    entry.split_once('=').map(|(_, value)| value)
}

/// The home directory of a user as the container's `/etc/passwd` has it, `/` where it says nothing.
///
/// The file belongs to the image: it is read as a regular file of bounded size, found inside the root.
pub(crate) fn home(root: impl AsFd, uid: u32) -> String {
    let passwd = Root::new(&root)
        .read_file("etc/passwd", MAX_PASSWD_BYTES)
        .unwrap_or_default();
    home_in(&passwd, uid).unwrap_or_else(|| "/".to_owned())
}

/// The path that `execve` takes for `program`, searched as a shell would, in the present root and working directory.
///
/// The error is the whole text that callers know.
pub(crate) fn find_program(program: &str, search_path: Option<&str>) -> Result<CString, String> {
    let refuse = |why: &str| Err(format!("exec: \"{program}\": {why}"));
    if program.contains('/') {
        return match executable(Path::new(program)) {
            Ok(path) => Ok(path),
            Err(Refusal::Stat(errno)) => refuse(&format!("stat {program}: {}", lower(errno))),
            Err(Refusal::Directory) => refuse("is a directory"),
            Err(Refusal::Access(errno)) => refuse(&lower(errno)),
        };
    }
    // Relative directories are left out: what they lead to changes with the working directory.
    let directories = search_path
        .unwrap_or_default()
        .split(':')
        .filter(|directory| directory.starts_with('/'));
    for directory in directories {
        if program.is_empty() {
            break;
        }
        if let Ok(path) = executable(&Path::new(directory).join(program)) {
            return Ok(path);
        }
    }
    refuse("executable file not found in $PATH")
}

/// Why a path is no program.
enum Refusal {
    Stat(Errno),
    Directory,
    Access(Errno),
}

fn executable(file: &Path) -> Result<CString, Refusal> {
    let path = CString::new(file.as_os_str().as_bytes()).map_err(|_| Refusal::Stat(Errno::EINVAL))?;
    let seen = path::open(file, OFlags::PATH)
        .and_then(path::stat)
        .map_err(|error| Refusal::Stat(error.errno()))?;
    if seen.kind == Kind::Directory {
        return Err(Refusal::Directory);
    }
    may_execute(&path).map_err(Refusal::Access)?;
    Ok(path)
}

/// The kernel's text as runc prints it.
fn lower(errno: Errno) -> String {
    errno.to_string().to_lowercase()
}

fn name(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(name, _)| name)
}

fn home_in(passwd: &[u8], uid: u32) -> Option<String> {
    let uid = uid.to_string();
    passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.split(|byte| *byte == b':').skip(2);
        if fields.next()? != uid.as_bytes() {
            return None;
        }
        let home = std::str::from_utf8(fields.nth(2)?).ok()?;
        (!home.is_empty() && !home.contains('\0')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_one_name_counts() {
        let entries = ["A=1", "B=2", "A=3=4", "B="].map(str::to_owned);
        assert_eq!(unique(&entries), ["A=3=4", "B="]);
        assert_eq!(value(&unique(&entries), "A"), Some("3=4"));
        assert_eq!(value(&unique(&entries), "C"), None);
    }

    #[test]
    fn homes_are_found_by_number_alone() {
        let passwd = b"# comment\nroot:x:0:0:root:/root:/bin/sh\n1000:x:0:0::/evil:\nu:x:1000:1000::/home/u:/bin/sh\nv:x:7:7::::\nshort:x:8\n";
        assert_eq!(home_in(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_in(passwd, 1000).as_deref(), Some("/home/u"));
        assert_eq!(home_in(passwd, 7), None, "empty");
        assert_eq!(home_in(passwd, 8), None, "cut short");
        assert_eq!(home_in(passwd, 9), None);
    }

    #[test]
    fn programs_are_found_and_refused_in_runcs_words() {
        assert_eq!(
            find_program("sh", Some("/nonexistent:/bin:relative"))
                .unwrap()
                .as_c_str(),
            c"/bin/sh"
        );
        let missing = find_program("no-such", Some("/bin")).unwrap_err();
        assert_eq!(missing, "exec: \"no-such\": executable file not found in $PATH");
        find_program("sh", None).unwrap_err();
        find_program("", Some("/bin")).unwrap_err();
        let missing = find_program("/no/such/program", None).unwrap_err();
        assert_eq!(
            missing,
            "exec: \"/no/such/program\": stat /no/such/program: no such file or directory"
        );
        assert_eq!(
            find_program("/etc/passwd", None).unwrap_err(),
            "exec: \"/etc/passwd\": permission denied"
        );
        assert_eq!(
            find_program("/etc", None).unwrap_err(),
            "exec: \"/etc\": is a directory"
        );
    }
}
