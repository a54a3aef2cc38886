//! A network's configuration out of a template and the node's pod addresses.
//!
//! Templates are those that containerd documents, in that part of their language which such files use:
//!
//! - `{{.PodCIDR}}`: the first of the addresses;
//! - `{{range $i, $range := .PodCIDRRanges}}…{{end}}` and the same over `.Routes`; also `{{range $x := …}}` and
//!   `{{range …}}`, inside of which `{{.}}` is the entry;
//! - `{{if $i}}…{{end}}`: true for an index but 0, a text that is not empty, a list with entries;
//! - `{{$name}}`, and `{{-` and `-}}`, which take the white space beside them away.
//!
//! Anything else is refused by its name.

use std::net::IpAddr;

/// Deepest nesting of blocks.
const DEPTH_MAX: usize = 16;
/// Most addresses of a node.
const CIDRS_MAX: usize = 16;

/// The addresses of a node's pods, as `a/n` or `a/n,b/m`.
pub(super) fn parse_cidrs(text: &str) -> Option<Vec<String>> {
    let valid = |cidr: &&str| {
        let Some((address, prefix)) = cidr.split_once('/') else {
            return false;
        };
        let longest = match address.parse::<IpAddr>() {
            Ok(IpAddr::V4(_)) => 32,
            Ok(IpAddr::V6(_)) => 128,
            Err(_) => return false,
        };
        prefix.parse::<u8>().is_ok_and(|prefix| prefix <= longest)
    };
    let cidrs: Vec<_> = text.split(',').map(str::trim).collect();
    let fits = cidrs.len() <= CIDRS_MAX && cidrs.iter().all(valid);
    fits.then(|| cidrs.into_iter().map(str::to_owned).collect())
}

/// Fills a template in.
pub(super) fn render(template: &str, cidrs: &[String]) -> Result<String, String> {
    let has = |v6: bool| cidrs.iter().any(|cidr| cidr.contains(':') == v6);
    let routes = [(has(false), "0.0.0.0/0"), (has(true), "::/0")];
    let routes = routes.into_iter().filter(|(has, _)| *has);
    let mut page = Page {
        tokens: tokens(template)?,
        at: 0,
        cidrs: cidrs.to_vec(),
        routes: routes.map(|(_, route)| route.to_owned()).collect(),
        names: Vec::new(),
        out: String::new(),
    };
    page.block(0, true)?;
    Ok(page.out)
}

enum Token {
    Text(String),
    Action(String),
}

#[derive(Clone)]
enum Item {
    Text(String),
    List(Vec<String>),
    Index(usize),
}

struct Page {
    tokens: Vec<Token>,
    at: usize,
    cidrs: Vec<String>,
    routes: Vec<String>,
    /// Variables, the innermost last; `.` is the entry of a range.
    names: Vec<(String, Item)>,
    out: String,
}

fn tokens(template: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = template;
    let mut trim = false;
    loop {
        let (text, action) = match rest.split_once("{{") {
            Some((text, after)) => {
                let (action, after) = after.split_once("}}").ok_or("a {{ has no }}")?;
                rest = after;
                (text, Some(action))
            }
            None => (rest, None),
        };
        let mut text = if trim { text.trim_start() } else { text };
        let Some(action) = action else {
            tokens.push(Token::Text(text.to_owned()));
            return Ok(tokens);
        };
        let mut words = action;
        if let Some(trimmed) = words.strip_prefix("- ") {
            (words, text) = (trimmed, text.trim_end());
        }
        trim = words.ends_with(" -");
        let words = words.strip_suffix(" -").unwrap_or(words).trim();
        tokens.push(Token::Text(text.to_owned()));
        tokens.push(Token::Action(words.to_owned()));
    }
}

impl Page {
    /// Everything up to the block's end; `shown` is whether it is part of the page.
    fn block(&mut self, depth: usize, shown: bool) -> Result<(), String> {
        if depth > DEPTH_MAX {
            return Err("its blocks are nested too deeply".to_owned());
        }
        while let Some(token) = self.tokens.get(self.at) {
            self.at += 1;
            let action = match token {
                Token::Text(text) => {
                    if shown {
                        self.out.push_str(text);
                    }
                    continue;
                }
                Token::Action(action) => action.clone(),
            };
            if action == "end" {
                return if depth > 0 {
                    Ok(())
                } else {
                    Err("an {{end}} ends nothing".to_owned())
                };
            }
            if let Some(condition) = action.strip_prefix("if ") {
                let holds = shown
                    && match self.item(condition)? {
                        Item::Text(text) => !text.is_empty(),
                        Item::List(list) => !list.is_empty(),
                        Item::Index(index) => index > 0,
                    };
                self.block(depth + 1, holds)?;
            } else if let Some(range) = action.strip_prefix("range ") {
                self.range(range, depth, shown)?;
            } else if shown {
                match self.item(&action)? {
                    Item::Text(text) => self.out.push_str(&text),
                    Item::Index(index) => self.out.push_str(&index.to_string()),
                    Item::List(_) => return Err(format!("{{{{{action}}}}} is a list")),
                }
            }
        }
        if depth > 0 {
            return Err("a block has no {{end}}".to_owned());
        }
        Ok(())
    }

    fn range(&mut self, range: &str, depth: usize, shown: bool) -> Result<(), String> {
        let (names, list) = match range.split_once(":=") {
            Some((names, list)) => (
                names.split(',').map(|name| name.trim().to_owned()).collect(),
                list,
            ),
            None => (Vec::new(), range),
        };
        if names.len() > 2 || names.iter().any(|name: &String| !name.starts_with('$')) {
            return Err(format!("{{{{range {range}}}}} is not understood"));
        }
        let entries = match self.item(list.trim()) {
            _ if !shown => Vec::new(),
            Ok(Item::List(entries)) => entries,
            Ok(_) => return Err(format!("{{{{range {range}}}}} is not over a list")),
            Err(error) => return Err(error),
        };
        let start = self.at;
        if entries.is_empty() {
            return self.block(depth + 1, false);
        }
        for (index, entry) in entries.into_iter().enumerate() {
            self.at = start;
            let outside = self.names.len();
            if let [name, _] = names.as_slice() {
                self.names.push((name.clone(), Item::Index(index)));
            }
            if let Some(name) = names.last() {
                self.names.push((name.clone(), Item::Text(entry.clone())));
            }
            self.names.push((".".to_owned(), Item::Text(entry)));
            self.block(depth + 1, true)?;
            self.names.truncate(outside);
        }
        Ok(())
    }

    fn item(&self, name: &str) -> Result<Item, String> {
        match name {
            ".PodCIDR" => Ok(Item::Text(self.cidrs.first().cloned().unwrap_or_default())),
            ".PodCIDRRanges" => Ok(Item::List(self.cidrs.clone())),
            ".Routes" => Ok(Item::List(self.routes.clone())),
            _ => {
                let found = self.names.iter().rev().find(|(known, _)| known == name);
                found.map(|(_, item)| item.clone()).ok_or_else(|| {
                    let short: String = name.chars().take(64).collect();
                    format!("{{{{{short}}}}} is not understood")
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidrs(text: &str) -> Vec<String> {
        parse_cidrs(text).unwrap()
    }

    #[test]
    fn the_documented_template_is_filled_in() {
        let template = r#""subnet": "{{.PodCIDR}}",
  "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
  "routes": [{{range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst": "{{$route}}"}{{end}}]"#;
        assert_eq!(
            render(template, &cidrs("10.1.0.0/16, fd00::/64")).unwrap(),
            r#""subnet": "10.1.0.0/16",
  "ranges": [[{"subnet": "10.1.0.0/16"}], [{"subnet": "fd00::/64"}]],
  "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]"#
        );
        assert_eq!(
            render("{{- range .Routes }}<{{.}}>{{ end -}}  x", &cidrs("fd00::/64")).unwrap(),
            "<::/0>x"
        );
    }

    #[test]
    fn what_it_does_not_understand_is_named() {
        for (template, part) in [
            ("{{.PodCIDR", "}}"),
            ("{{end}}", "ends nothing"),
            ("{{if .PodCIDR}}", "no {{end}}"),
            ("{{.Nothing}}", ".Nothing"),
            ("{{printf .PodCIDR}}", "printf"),
            ("{{range .PodCIDR}}{{end}}", "not over a list"),
            ("{{range a, b := .Routes}}{{end}}", "not understood"),
            ("{{.Routes}}", "is a list"),
            ("{{range $x := .Routes}}{{end}}{{$x}}", "$x"),
        ] {
            let error = render(template, &cidrs("10.1.0.0/16")).unwrap_err();
            assert!(error.contains(part), "{template}: {error}");
        }
        let deep = "{{if .PodCIDR}}".repeat(100);
        assert!(render(&deep, &cidrs("10.1.0.0/16")).unwrap_err().contains("deep"));
    }

    #[test]
    fn addresses_of_pods_are_checked() {
        assert_eq!(cidrs("10.1.0.0/16"), ["10.1.0.0/16"]);
        let many = vec!["10.1.0.0/16"; 17].join(",");
        for bad in [
            "",
            "10.1.0.0",
            "10.1.0.0/33",
            "x/8",
            "10.1.0.0/16,",
            "\"/8",
            &many,
        ] {
            assert_eq!(parse_cidrs(bad), None, "{bad}");
        }
    }
}
