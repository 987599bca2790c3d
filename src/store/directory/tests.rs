//! Tests of the state directory: locking, damaged files and foreign directories.

use super::*;

#[test]
fn directory_of_another_program_is_refused_and_unchanged() {
    let dir = tempfile::tempdir().expect("tempdir");
    fs::create_dir(dir.path().join("db")).expect("their database");
    fs::write(dir.path().join("token"), "theirs").expect("their token");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    let error = StateDir::open(dir.path()).expect_err("not ours").to_string();
    assert!(error.contains("something else"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 2);
    let mode = fs::metadata(dir.path()).expect("metadata").permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
}

#[test]
fn state_directory_without_its_key_is_not_taken_for_another_programs() {
    let dir = tempfile::tempdir().expect("tempdir");
    fs::create_dir(dir.path().join(DATABASE)).expect("a database");
    fs::write(dir.path().join(LOCK), "").expect("a lock");
    let error = StateDir::open(dir.path()).expect_err("no key").to_string();
    assert!(error.contains("node.key is missing: restore"), "{error}");
}

#[test]
fn new_identity_drops_the_database_and_the_underlay_address_of_a_copy() {
    let dir = tempfile::tempdir().expect("tempdir");
    let state = StateDir::open(dir.path()).expect("opens");
    state.save_node_key(&[7; 32]).expect("written");
    state.save_underlay([10, 99, 0, 13].into(), 1450).expect("written");
    state.new_identity(&[8; 32]).expect("reset");
    assert_eq!(state.underlay().expect("readable"), None);
    assert_eq!(state.node_key().expect("readable"), Some([8; 32]));
}

#[test]
fn directory_with_unfinished_first_key_is_accepted() {
    let dir = tempfile::tempdir().expect("tempdir");
    fs::write(dir.path().join(LOCK), "").expect("a lock");
    // After a power cut the name may be on disk without the content.
    fs::write(dir.path().join(KEY_TEMPORARY), "").expect("half of a file");
    let state = StateDir::open(dir.path()).expect("it is ours");
    assert_eq!(state.node_key().expect("readable"), None);
    state.save_node_key(&[7; 32]).expect("written");
    drop(state);
    assert!(!dir.path().join(KEY_TEMPORARY).exists());
    assert_eq!(StateDir::peek_node_key(dir.path()).expect("ours"), Some([7; 32]));
}

#[test]
fn key_with_any_flipped_bit_is_refused() {
    let text = key_to_text(&[7; 32]);
    assert_eq!(key_from_text(&text), Some([7; 32]));
    for byte in 0..text.trim_end().len() {
        for bit in 0..8 {
            let mut bytes = text.clone().into_bytes();
            bytes[byte] ^= 1 << bit;
            let read = String::from_utf8(bytes).ok().and_then(|text| key_from_text(&text));
            // A flipped bit may change the case of a digit, which does not matter.
            assert!(read.is_none_or(|seed| seed == [7; 32]), "bit {bit} of byte {byte}");
        }
    }
}

#[test]
fn pipe_instead_of_lock_file_is_refused_at_once() {
    let dir = tempfile::tempdir().expect("tempdir");
    nix::unistd::mkfifo(&dir.path().join(LOCK), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let refused = [
        StateDir::open(dir.path()).expect_err("refused").to_string(),
        StateDir::peek_node_key(dir.path()).expect_err("refused").to_string(),
    ];
    for error in refused {
        assert!(error.contains("lock") && error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn damaged_boot_file_counts_as_same_boot() {
    let dir = tempfile::tempdir().expect("tempdir");
    let state = StateDir::open(dir.path()).expect("opens");
    state.note_boot().expect("noted");
    assert!(state.is_same_boot());
    let file = dir.path().join(BOOT);
    for damaged in [&b"\xff\xfe"[..], b"", b"5c0a", b"0a7d2f1e-9c1b-4c37-9f0d-b0b86d1fzzzz\n"] {
        fs::write(&file, damaged).expect("written");
        assert!(state.is_same_boot(), "{damaged:?}");
    }
    fs::write(&file, "0a7d2f1e-9c1b-4c37-9f0d-b0b86d1f0000\n").expect("written");
    assert!(!state.is_same_boot());
}

#[test]
fn damaged_file_that_can_be_rebuilt_counts_as_absent() {
    let dir = tempfile::tempdir().expect("tempdir");
    let state = StateDir::open(dir.path()).expect("opens");
    let (address, subnet) = ([192, 0, 2, 7].into(), "10.42.7.0/24".parse().expect("a subnet"));
    let long = vec![b'7'; files::SMALL as usize + 1];
    for damaged in [&b"\xff\xfe\n"[..], b"", b"192.0.2.7", b"10.42.7.0/", &long] {
        fs::write(dir.path().join(UNDERLAY), damaged).expect("written");
        assert_eq!(state.underlay().expect("as without"), None);
        state.save_underlay(address, 1450).expect("written again");
        assert_eq!(state.underlay().expect("read"), Some((address, 1450)));
        fs::write(dir.path().join(POD_CIDR), damaged).expect("written");
        assert_eq!(state.pod_cidrs().expect("as without"), []);
        state.save_pod_cidrs(&[subnet]).expect("written again");
        assert_eq!(state.pod_cidrs().expect("read"), [subnet]);
    }
}

#[test]
fn damaged_file_that_cannot_be_rebuilt_is_refused_with_advice() {
    let dir = tempfile::tempdir().expect("tempdir");
    let state = StateDir::open(dir.path()).expect("opens");
    for name in [KEY, TOKEN, SECRETS] {
        fs::write(dir.path().join(name), b"\xff\xfe\n").expect("written");
    }
    let said = [
        state.node_key().expect_err("refused").to_string(),
        state.token().expect_err("refused").to_string(),
        state.keyring().expect_err("refused").to_string(),
    ];
    for (said, name) in said.iter().zip([KEY, TOKEN, SECRETS]) {
        assert!(said.contains(name) && !said.contains("UTF-8"), "{said}");
    }
    assert!(said[0].contains("restore it") && said[2].contains("restore it"), "{said:?}");
}

#[test]
fn peeking_changes_nothing_and_respects_the_lock() {
    let dir = tempfile::tempdir().expect("tempdir");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    assert_eq!(StateDir::peek_node_key(dir.path()).expect("looked at"), None);
    assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 0);
    let mode = fs::metadata(dir.path()).expect("metadata").permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
    let state = StateDir::open(dir.path()).expect("opens");
    state.save_node_key(&[7; 32]).expect("saved");
    let error = StateDir::peek_node_key(dir.path()).expect_err("held").to_string();
    assert!(error.contains("another gossamer"), "{error}");
    drop(state);
    assert_eq!(StateDir::peek_node_key(dir.path()).expect("looked at"), Some([7; 32]));
    let other = tempfile::tempdir().expect("tempdir");
    fs::write(other.path().join("token"), "theirs").expect("their token");
    assert!(StateDir::peek_node_key(other.path()).is_err());
}

#[test]
fn directory_is_exclusive_and_wiping_removes_only_own_files() {
    let dir = tempfile::tempdir().expect("tempdir");
    let state = StateDir::open(dir.path()).expect("opens");
    let error = StateDir::open(dir.path()).expect_err("held").to_string();
    let own = format!("in use by process {}: is another gossamer", std::process::id());
    assert!(error.contains(&own), "{error}");
    state.save_node_key(&[7; 32]).expect("saved");
    let secret = crate::wire::Secret::new(vec![7; 32]).expect("long enough");
    state.save_keyring(&Keyring::new(secret)).expect("saved");
    state.save_underlay([192, 0, 2, 1].into(), 1450).expect("saved");
    assert_eq!(state.underlay().expect("read"), Some(([192, 0, 2, 1].into(), 1450)));
    assert_eq!(state.node_key().expect("read"), Some([7; 32]));
    fs::create_dir(dir.path().join("db.damaged-1")).expect("made");
    fs::write(dir.path().join("notes"), "not ours").expect("written");
    state.wipe().expect("wiped");
    let left: Vec<_> = fs::read_dir(dir.path())
        .expect("readable")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    assert_eq!(left, ["notes"]);
}
