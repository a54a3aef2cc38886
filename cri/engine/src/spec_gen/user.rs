//! The ids that a process starts with.
//!
//! One parser for every place that names a user: what begins with a digit is a number in range or an error, never
//! looked up as a name, so that no line of an image's `/etc/passwd` can turn a number into another one.

use coracle_proto::cri::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};

use super::UserFiles;
use super::error::{Result, invalid, known};

/// The kernel's limit on supplementary groups.
const GROUPS_MAX: usize = 65536;

/// Longest name that is looked up; `useradd` takes 32 bytes.
const NAME_BYTES: usize = 256;

/// Who a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ids {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Supplementary groups, the primary one first: a file that forbids its group must forbid it to us too.
    pub(super) groups: Vec<u32>,
}

/// What the request says, else the image, else root.
pub(super) fn resolve(
    context: &LinuxContainerSecurityContext,
    image_user: &str,
    files: &UserFiles,
) -> Result<Ids> {
    let field = |name: &str| format!("config.linux.security_context.{name}");
    let wanted = match (&context.run_as_user, context.run_as_username.as_str()) {
        (Some(_), name) if !name.is_empty() => {
            let why = "and run_as_user are both given";
            return Err(invalid(field("run_as_username"), why));
        }
        (Some(id), _) => Some((
            field("run_as_user"),
            Wanted::Id(id_of(&field("run_as_user"), id.value)?),
        )),
        (None, "") => None,
        (None, name) => Some((field("run_as_username"), parse(&field("run_as_username"), name)?)),
    };
    if wanted.is_none() && context.run_as_group.is_some() {
        return Err(invalid(
            field("run_as_group"),
            "needs run_as_user or run_as_username",
        ));
    }

    let mut group = None;
    let (place, wanted) = match wanted {
        Some(wanted) => wanted,
        None => {
            let place = "image.config.user".to_owned();
            let (user, named) = match image_user.split_once(':') {
                Some((user, named)) => (user, Some(named)),
                None => (image_user, None),
            };
            group = named.map(|named| group_id(&place, named, files)).transpose()?;
            let user = if user.is_empty() && (named.is_some() || image_user.is_empty()) {
                Wanted::Id(0)
            } else {
                parse(&place, user)?
            };
            (place, user)
        }
    };
    if let Some(id) = &context.run_as_group {
        group = Some(id_of(&field("run_as_group"), id.value)?);
    }

    let account = match &wanted {
        Wanted::Id(uid) => Account::by_uid(&files.passwd, *uid),
        Wanted::Name(name) => Some(Account::by_name(&place, &files.passwd, name)?),
    };
    let uid = match (&wanted, &account) {
        (Wanted::Id(uid), _) => *uid,
        (Wanted::Name(_), Some(account)) => account.uid,
        // A name that is not found was an error above.
        (Wanted::Name(name), None) => return Err(invalid(place, format!("user {name:?} is unknown"))),
    };
    let gid = group.or(account.as_ref().map(|account| account.gid)).unwrap_or(0);

    let mut groups = vec![gid];
    for (i, id) in context.supplemental_groups.iter().enumerate() {
        groups.push(id_of(&field(&format!("supplemental_groups[{i}]")), *id)?);
    }
    let policy: SupplementalGroupsPolicy = known(
        &field("supplemental_groups_policy"),
        context.supplemental_groups_policy,
    )?;
    if policy == SupplementalGroupsPolicy::Merge
        && let Some(account) = &account
    {
        groups.extend(groups_of(&files.group, account.name));
    }
    let mut seen = std::collections::HashSet::new();
    groups.retain(|gid| seen.insert(*gid));
    if groups.len() > GROUPS_MAX {
        return Err(invalid(
            field("supplemental_groups"),
            format!("are more than {GROUPS_MAX} groups with those of the image"),
        ));
    }
    Ok(Ids { uid, gid, groups })
}

enum Wanted<'a> {
    Id(u32),
    Name(&'a str),
}

/// A user or group as an image or a request writes it.
fn parse<'a>(field: &str, text: &'a str) -> Result<Wanted<'a>> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return match number(text.as_bytes()) {
            Some(id) => Ok(Wanted::Id(id)),
            None => Err(invalid(field, format!("{} is no id below 2^32 - 1", shown(text)))),
        };
    }
    let first = text.bytes().next().unwrap_or_default();
    let well_formed = text.len() <= NAME_BYTES
        && (first.is_ascii_alphabetic() || first == b'_')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-$@".contains(&byte));
    if well_formed {
        Ok(Wanted::Name(text))
    } else {
        Err(invalid(
            field,
            format!("{} is neither an id nor a name", shown(text)),
        ))
    }
}

/// Quoted, and not longer than a line.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(64).collect();
    format!("{short:?}")
}

/// The highest number means "leave it" to the kernel.
fn number(digits: &[u8]) -> Option<u32> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let text = std::str::from_utf8(digits).ok()?;
    text.parse().ok().filter(|id| *id != u32::MAX)
}

fn id_of(field: &str, value: i64) -> Result<u32> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| invalid(field, format!("{value} is not a valid id, 0 to 2^32 - 2")))
}

/// A line of `/etc/passwd`.
struct Account<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
}

impl<'a> Account<'a> {
    fn by_uid(passwd: &'a [u8], uid: u32) -> Option<Account<'a>> {
        lines(passwd)
            .filter_map(Account::parse)
            .find(|account| account.uid == uid)
    }

    /// The first line of that name counts, and must be well formed.
    fn by_name(field: &str, passwd: &'a [u8], name: &str) -> Result<Account<'a>> {
        let line = lines(passwd)
            .find(|line| line.split(|byte| *byte == b':').next() == Some(name.as_bytes()))
            .ok_or_else(|| invalid(field, format!("the image has no user {name:?}")))?;
        Account::parse(line).ok_or_else(|| {
            invalid(
                field,
                format!("the line of user {name:?} in the image's /etc/passwd is malformed"),
            )
        })
    }

    fn parse(line: &'a [u8]) -> Option<Account<'a>> {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = number(fields.nth(1)?)?;
        let gid = number(fields.next()?)?;
        Some(Account { name, uid, gid })
    }
}

/// A line of `/etc/group` without its members: name and id.
fn parse_group(line: &[u8]) -> Option<(&[u8], u32, &[u8])> {
    let mut fields = line.split(|byte| *byte == b':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let gid = number(fields.nth(1)?)?;
    Some((name, gid, fields.next().unwrap_or_default()))
}

fn group_id(field: &str, text: &str, files: &UserFiles) -> Result<u32> {
    let name = match parse(field, text)? {
        Wanted::Id(gid) => return Ok(gid),
        Wanted::Name(name) => name,
    };
    let line = lines(&files.group)
        .find(|line| line.split(|byte| *byte == b':').next() == Some(name.as_bytes()))
        .ok_or_else(|| invalid(field, format!("group {name:?} is not in the image's /etc/group")))?;
    parse_group(line).map(|(_, gid, _)| gid).ok_or_else(|| {
        invalid(
            field,
            format!("the line of group {name:?} in the image's /etc/group is malformed"),
        )
    })
}

fn groups_of<'a>(group: &'a [u8], user: &'a [u8]) -> impl Iterator<Item = u32> + 'a {
    lines(group)
        .filter_map(parse_group)
        .filter_map(move |(_, gid, members)| {
            members
                .split(|byte| *byte == b',')
                .any(|member| member == user)
                .then_some(gid)
        })
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|byte| *byte == b'\n')
        .filter(|line| !line.starts_with(b"#"))
}

#[cfg(test)]
mod tests {
    use coracle_proto::cri::Int64Value;

    use super::*;

    const PASSWD: &str = "# comment\nroot:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/:/bin/sh\n\
                          short:x\nbad:x:4294967296:0::/:\nlast:x:4294967295:0::/:\nnogid:x:5::::\n";
    const GROUP: &str =
        "root:x:0:\nwheel:x:10:app\napp:x:1001:\ndata:x:3000:app\nothers:x:77:apps,ap\nbad:x:x:app\n";

    fn files() -> UserFiles {
        UserFiles {
            passwd: PASSWD.into(),
            group: GROUP.into(),
        }
    }

    fn of_image(user: &str) -> Result<(u32, u32, Vec<u32>)> {
        resolve(&Default::default(), user, &files()).map(|ids| (ids.uid, ids.gid, ids.groups))
    }

    fn of_request(context: &LinuxContainerSecurityContext) -> Result<(u32, u32, Vec<u32>)> {
        resolve(context, "app:data", &files()).map(|ids| (ids.uid, ids.gid, ids.groups))
    }

    fn id(value: i64) -> Option<Int64Value> {
        Some(Int64Value { value })
    }

    #[test]
    fn the_user_of_an_image_in_every_form() {
        assert_eq!(of_image("").unwrap(), (0, 0, vec![0]));
        assert_eq!(of_image("app").unwrap(), (1000, 1001, vec![1001, 10, 3000]));
        assert_eq!(of_image("1000").unwrap(), (1000, 1001, vec![1001, 10, 3000]));
        assert_eq!(of_image("app:data").unwrap(), (1000, 3000, vec![3000, 10]));
        assert_eq!(of_image("app:0").unwrap(), (1000, 0, vec![0, 10, 3000]));
        assert_eq!(of_image("4242").unwrap(), (4242, 0, vec![0]));
        assert_eq!(of_image("4242:4343").unwrap(), (4242, 4343, vec![4343]));
        assert_eq!(of_image("2147483648:0").unwrap(), (2_147_483_648, 0, vec![0]));
        assert_eq!(of_image("4294967294").unwrap(), (u32::MAX - 1, 0, vec![0]));
    }

    #[test]
    fn what_looks_like_a_number_is_never_a_name() {
        let hostile = [
            "4294967296",
            "4294967295",
            "-1",
            "0x0",
            "\u{661}",
            "+1",
            " 1",
            "1 ",
            "99999999999999999999",
            "1e3",
            "0day",
            "1:",
            ":",
            "1:-1",
            "1:4294967295",
            "1:2:3",
            "1000:\u{661}",
            "\u{e4}",
            "a b",
            "root\n",
        ];
        let mut passwd = String::new();
        let mut group = String::new();
        for value in hostile {
            let name = value.split(':').next().unwrap_or_default();
            passwd += &format!("{name}:x:0:0::/:\n");
            group += &format!("{name}:x:0:\n");
        }
        let files = UserFiles {
            passwd: passwd.into(),
            group: group.into(),
        };
        for value in hostile {
            assert!(
                resolve(&Default::default(), value, &files).is_err(),
                "image {value:?}"
            );
            let context = LinuxContainerSecurityContext {
                run_as_username: value.into(),
                ..Default::default()
            };
            assert!(resolve(&context, "", &files).is_err(), "request {value:?}");
        }
        // A number that is one stays itself, whatever a line of that name says.
        let files = UserFiles {
            passwd: b"1:x:0:0::/:\n".to_vec(),
            group: b"1:x:0:\n".to_vec(),
        };
        assert_eq!(resolve(&Default::default(), "1:1", &files).unwrap().uid, 1);
        assert_eq!(resolve(&Default::default(), "1:1", &files).unwrap().gid, 1);
    }

    #[test]
    fn unknown_and_malformed_accounts_are_errors() {
        for bad in [
            "nobody",
            "short",
            "bad",
            "last",
            "nogid",
            "app:nogroup",
            "app:bad",
        ] {
            let error = of_image(bad).unwrap_err().to_string();
            assert!(error.starts_with("image.config.user: "), "{error}");
        }
        let empty = UserFiles::default();
        resolve(&Default::default(), "root", &empty).unwrap_err();
        assert_eq!(resolve(&Default::default(), "7", &empty).unwrap().uid, 7);
    }

    #[test]
    fn the_request_comes_before_the_image() {
        let by_id = LinuxContainerSecurityContext {
            run_as_user: id(1000),
            ..Default::default()
        };
        assert_eq!(of_request(&by_id).unwrap(), (1000, 1001, vec![1001, 10, 3000]));
        let with_group = LinuxContainerSecurityContext {
            run_as_group: id(5),
            ..by_id.clone()
        };
        assert_eq!(of_request(&with_group).unwrap(), (1000, 5, vec![5, 10, 3000]));
        let by_name = LinuxContainerSecurityContext {
            run_as_username: "root".into(),
            ..Default::default()
        };
        assert_eq!(of_request(&by_name).unwrap(), (0, 0, vec![0]));
        let numeric_name = LinuxContainerSecurityContext {
            run_as_username: "1000".into(),
            ..Default::default()
        };
        assert_eq!(of_request(&numeric_name).unwrap().0, 1000);
    }

    #[test]
    fn requests_that_cannot_be_are_refused() {
        let base = LinuxContainerSecurityContext::default;
        let bad = [
            LinuxContainerSecurityContext {
                run_as_group: id(5),
                ..base()
            },
            LinuxContainerSecurityContext {
                run_as_user: id(-1),
                ..base()
            },
            LinuxContainerSecurityContext {
                run_as_user: id(1 << 32),
                ..base()
            },
            LinuxContainerSecurityContext {
                run_as_user: id((1 << 32) - 1),
                ..base()
            },
            LinuxContainerSecurityContext {
                run_as_user: id(1),
                run_as_group: id(-1),
                ..base()
            },
            LinuxContainerSecurityContext {
                run_as_user: id(1),
                run_as_username: "root".into(),
                ..base()
            },
            LinuxContainerSecurityContext {
                supplemental_groups: vec![1, -1],
                ..base()
            },
            LinuxContainerSecurityContext {
                supplemental_groups_policy: 7,
                ..base()
            },
        ];
        for context in bad {
            let error = of_request(&context).unwrap_err().to_string();
            assert!(error.starts_with("config.linux.security_context."), "{error}");
        }
    }

    #[test]
    fn strict_leaves_the_groups_of_the_image_out() {
        let merge = LinuxContainerSecurityContext {
            run_as_user: id(1000),
            supplemental_groups: vec![10, 60_000],
            ..Default::default()
        };
        assert_eq!(of_request(&merge).unwrap().2, [1001, 10, 60_000, 3000]);
        let strict = LinuxContainerSecurityContext {
            supplemental_groups_policy: SupplementalGroupsPolicy::Strict.into(),
            ..merge
        };
        assert_eq!(of_request(&strict).unwrap().2, [1001, 10, 60_000]);
    }
}
