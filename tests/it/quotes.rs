//! Messages that the documentation quotes are those of the program.
//!
//! A quote must be composed of pieces of string literals and of short values between them. A piece is what
//! a literal has between two placeholders. The first piece may begin, and the last one end, at any word.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use crate::docs;

/// Most consecutive words of a value in a message. Longer runs are text that the program does not have.
const MAX_VALUE_WORDS: usize = 2;
/// A quote with fewer words is no message.
const MIN_WORDS: usize = 3;

/// Words that occur in values of any length: the language of rules.
const NEUTRAL: &str = "ip inet arp filter input output forward nat mangle table chain rule hook tcp udp \
                       dport saddr daddr insert accept";

/// First words of commands and rules, which are no messages.
const COMMANDS: &str = "apt bridge cargo chmod conntrack ctr docker docker-compose ethtool gossamer helm iif \
                        ip iptables journalctl k3s kube-controller-manager kubectl local meta mkdir \
                        modprobe networkctl nft nmcli ping podman ps ss systemctl systemd-analyze tc \
                        tcpdump weave";

/// Parts of quotes of other programs, and of messages with long values.
const EXEMPT: [&str; 8] = [
    "TOML parse error at line 1, column 1",
    "unknown field `netwrok`, expected one of",
    "failed to find driver or plugin \"gossamer\"",
    "unknown network driver",
    "not in any subnet on network",
    "invalid ownership metadata",
    "drops some packets between pods: those",
    "gives some packets between pods the mark",
];

type Piece = Vec<String>;

fn words(text: &str) -> Piece {
    let trimmed =
        text.split_whitespace().map(|word| word.trim_matches(|c| "`\",;:().'".contains(c)));
    trimmed.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Returns whether a word is of the language, and not a name, a number or a sign.
fn is_plain(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.chars().all(|c| c.is_ascii_lowercase() || matches!(c, '\'' | '-'))
}

/// Returns whether a list has a word.
fn contains(list: &str, word: &str) -> bool {
    list.split(' ').any(|listed| listed == word)
}

/// Returns the string literals of a source file, without escapes.
fn literals(source: &str) -> Vec<String> {
    let lines = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let source: Vec<&str> = lines.collect();
    let source = source.join("\n");
    let (mut literals, mut rest) = (Vec::new(), source.chars().peekable());
    let mut literal: Option<String> = None;
    while let Some(c) = rest.next() {
        match (&mut literal, c) {
            (None, '"') => literal = Some(String::new()),
            (None, '\'') if rest.peek() == Some(&'"') => _ = rest.next(),
            (None, _) => {}
            (Some(_), '"') => literals.extend(literal.take()),
            (Some(text), '\\') => match rest.next() {
                Some('\n') => while rest.next_if(|c| c.is_whitespace()).is_some() {},
                Some('n') => text.push(' '),
                Some(c) => text.push(c),
                None => {}
            },
            (Some(text), c) => text.push(c),
        }
    }
    literals
}

/// Returns the pieces of a literal that have at least two words. Text that touches a placeholder belongs to
/// the value.
fn pieces(literal: &str) -> Vec<Piece> {
    let (mut text, mut depth) = (String::new(), 0_usize);
    for c in literal.replace("{{", "").replace("}}", "").chars() {
        match c {
            '{' => (depth, _) = (depth + 1, text.push('\0')),
            '}' => depth = depth.saturating_sub(1),
            _ if depth == 0 => text.push(c),
            _ => {}
        }
    }
    let tokens: Vec<&str> = text.split_whitespace().collect();
    let split = tokens.split(|token| token.contains('\0'));
    split.map(|piece| words(&piece.join(" "))).filter(|piece| piece.len() > 1).collect()
}

/// All pieces of the program's messages, found by the words at their positions.
#[derive(Default)]
struct Messages {
    pieces: Vec<Piece>,
    by_word: BTreeMap<String, Vec<(usize, usize)>>,
}

impl Messages {
    fn of_the_program() -> Self {
        let mut all = BTreeSet::new();
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("readable").flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let source = fs::read_to_string(path).expect("UTF-8");
                    all.extend(literals(&source).iter().flat_map(|literal| pieces(literal)));
                }
            }
        }
        let mut messages = Self { pieces: all.into_iter().collect(), ..Self::default() };
        for (number, piece) in messages.pieces.iter().enumerate() {
            for (position, word) in piece.iter().enumerate() {
                messages.by_word.entry(word.clone()).or_default().push((number, position));
            }
        }
        messages
    }

    /// Returns whether a quote is composed of pieces and short values.
    fn have(&self, quote: &[String]) -> bool {
        // For each position: the shortest value before it, in words; `None` if it cannot be reached.
        let mut reached = vec![None; quote.len() + 1];
        reached[0] = Some(0);
        for start in 0..quote.len() {
            let Some(before) = reached[start] else { continue };
            let word = quote[start].as_str();
            let value = match word {
                _ if contains(NEUTRAL, word) => before,
                _ if is_plain(word) => before + 1,
                _ => 0,
            };
            if value <= MAX_VALUE_WORDS {
                let next = &mut reached[start + 1];
                *next = Some(next.map_or(value, |known: usize| known.min(value)));
            }
            for &(number, position) in self.by_word.get(word).into_iter().flatten() {
                if position > 0 && start > 0 {
                    continue;
                }
                let rest = &self.pieces[number][position..];
                let same = rest.iter().zip(&quote[start..]).take_while(|(a, b)| a == b).count();
                if same > 1 && (same == rest.len() || start + same == quote.len()) {
                    reached[start + same] = Some(0);
                }
            }
        }
        reached[quote.len()].is_some()
    }
}

/// Returns what a page quotes: code in its text, errors in transcripts, and with `blocks` the lines of blocks
/// without a language.
fn quotes(page: &str, blocks: bool) -> Vec<String> {
    let (mut quotes, mut prose, mut language) = (Vec::new(), String::new(), None);
    for line in page.lines() {
        match (line.trim_start().strip_prefix("```"), language) {
            (Some(info), None) => language = Some(info),
            (Some(_), Some(_)) => language = None,
            (None, None) => prose.extend([line, "\n"]),
            (None, Some(info)) => {
                let message = (blocks && info.is_empty()).then_some(line);
                let error = line.strip_prefix("gossamer: ");
                quotes.extend(error.or(message).map(str::to_owned));
            }
        }
    }
    quotes.extend(prose.split('`').skip(1).step_by(2).map(str::to_owned));
    quotes
}

/// Returns the parts of a quote that must be text of the program.
fn parts(quote: &str) -> Vec<Piece> {
    let quote = quote.strip_prefix("sudo ").unwrap_or(quote);
    let first = quote.split_whitespace().next().unwrap_or_default();
    if contains(COMMANDS, first) || quote.contains(" = ") || quote.starts_with('{') {
        return Vec::new();
    }
    let quote = quote.replace('…', "...").split_whitespace().collect::<Vec<_>>().join(" ");
    let known = |part: &&str| !EXEMPT.iter().any(|exempt| part.contains(exempt));
    let parts = quote.split("...").filter(known).map(words);
    parts.filter(|part| part.iter().filter(|word| is_plain(word)).count() >= MIN_WORDS).collect()
}

/// Pages whose blocks without a language are messages. On the others they are drawings.
const PAGES_WITH_MESSAGES: [&str; 2] = ["TROUBLESHOOTING.md", "CONFIGURATION.md"];

#[test]
fn quoted_messages_are_those_of_the_program() {
    let messages = Messages::of_the_program();
    let (mut stale, mut count) = (Vec::new(), 0);
    for (name, page) in docs::pages() {
        let blocks = PAGES_WITH_MESSAGES.contains(&name.as_str());
        for part in quotes(&page, blocks).iter().flat_map(|quote| parts(quote)) {
            count += 1;
            if !messages.have(&part) {
                stale.push(format!("{name}: {}", part.join(" ")));
            }
        }
    }
    assert!(count > 100, "the quotes were not found: {count}");
    assert!(stale.is_empty(), "no message of the program reads like this: {stale:#?}");
}

#[test]
fn quote_with_other_words_than_the_message_is_detected() {
    let source = r#"format!("{host} does not forward packets of pods to {peer}: turn forwarding \
                     on and \"restart\" the agent"); // "a comment"#;
    let mut messages = Messages::default();
    for (number, piece) in literals(source).iter().flat_map(|text| pieces(text)).enumerate() {
        for (position, word) in piece.iter().enumerate() {
            messages.by_word.entry(word.clone()).or_default().push((number, position));
        }
        messages.pieces.push(piece);
    }
    let have = |quote: &str| messages.have(&words(quote));
    assert!(have("h1 does not forward packets of pods to h2: turn forwarding on and \"restart\""));
    assert!(have("packets of pods to h2 (10.0.0.2): turn forwarding on"));
    assert!(!have("h1 does not forward packets of containers to h2: turn forwarding on"));
    assert!(!have("the agent must be started again by an operator"));
}
