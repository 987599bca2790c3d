//! Tests of the database: durability, damage and foreign records.

use super::*;

const ME: NodeId = NodeId::from_bytes([1; 8]);

fn starts(opened: &LoadedDatabase) -> Option<&Record> {
    opened.records.iter().find(|(key, _)| *key == Key::Starts).map(|(_, record)| record)
}

fn write(database: &Database, value: u32) {
    let record = Record::Starts(value).encode();
    database.write(&BTreeMap::from([(Key::Starts, record)])).expect("written");
}

#[test]
fn written_record_is_read_after_reopening() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("db");
    write(&Database::open(&path, ME).expect("opens").database, 7);
    let opened = Database::open(&path, ME).expect("opens again");
    assert_eq!(starts(&opened), Some(&Record::Starts(7)));
    assert!(opened.quarantined.is_none());
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!(
        (mode(&path), mode(&path.join("db")), mode(&path.join("conf"))),
        (0o700, 0o600, 0o600)
    );
}

#[test]
fn unfinished_snapshot_is_not_treated_as_damage() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("db");
    write(&Database::open(&path, ME).expect("opens").database, 7);
    for torn in [&b""[..], b"half of one", &[0; 4096]] {
        fs::write(path.join("snap.00000000000FFFFF.generating"), torn).expect("written");
        let opened = Database::open(&path, ME).expect("opens again");
        assert!(opened.quarantined.is_none(), "{:?}", opened.quarantined);
        assert_eq!(starts(&opened), Some(&Record::Starts(7)));
    }
}

#[test]
fn file_that_the_engine_cannot_read_into_memory_is_treated_as_damage() {
    let sparse = |path: &Path| {
        let file = fs::File::create(path).expect("created");
        file.set_len(1 << 40).expect("a sparse file");
    };
    let fifo = |path: &Path| {
        let _ = fs::remove_file(path);
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("created");
    };
    let ways: [&dyn Fn(&Path); 2] = [&sparse, &fifo];
    for name in ["conf", "snap.00000000000FFFFF", "blobs/7"] {
        for (way, replace) in ways.iter().enumerate() {
            let dir = tempfile::tempdir().expect("tempdir");
            let path = dir.path().join("db");
            write(&Database::open(&path, ME).expect("opens").database, 7);
            replace(&path.join(name));
            let opened = Database::open(&path, ME).expect("opens again");
            let (_, why) = opened.quarantined.as_ref().expect("moved aside");
            assert!(why.contains(name), "{name} {way}: {why}");
            assert!(opened.records.is_empty());
        }
    }
}

#[test]
fn system_error_inside_the_engine_is_not_treated_as_damage() {
    let panic =
        r#"called `Result::unwrap()` on an `Err` value: Io(Os { code: 24, kind: Uncategorized,"#;
    let error = os_error(panic).expect("an error of the system");
    assert_eq!(error.raw_os_error(), Some(24));
    assert!(os_error("index out of bounds: the len is 3 but the index is 7").is_none());
}

#[test]
fn clock_before_1970_is_refused_before_the_engine_opens() {
    let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
    let error = check_clock(before).expect_err("refused").to_string();
    assert!(error.contains("set it"), "{error}");
    assert!(check_clock(SystemTime::UNIX_EPOCH).is_ok());
}

#[test]
fn first_and_latest_quarantined_databases_are_kept() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("db");
    for number in 1..=5 {
        fs::create_dir(&path).expect("made");
        fs::write(path.join("number"), number.to_string()).expect("written");
        quarantine(&path).expect("moved");
    }
    let kept = [1, 2, 3].map(|n| {
        fs::read_to_string(dir.path().join(format!("db.damaged-{n}/number"))).expect("kept")
    });
    assert_eq!(kept, ["1", "2", "5"]);
}

#[test]
fn batch_count_survives_restarts_and_can_be_raised() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("db");
    let database = Database::open(&path, ME).expect("opens").database;
    assert_eq!(database.batches(), 0);
    write(&database, 7);
    write(&database, 8);
    drop(database);
    let database = Database::open(&path, ME).expect("opens again").database;
    assert_eq!(database.batches(), 2);
    database.raise_batches(1);
    assert_eq!(database.batches(), 2);
    database.raise_batches(9);
    write(&database, 9);
    drop(database);
    assert_eq!(Database::open(&path, ME).expect("opens again").database.batches(), 10);
}

#[test]
fn database_of_another_node_is_refused_unchanged_and_one_without_node_is_accepted() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("db");
    let other = NodeId::from_bytes([2; 8]);
    write(&Database::open(&path, other).expect("opens").database, 7);
    let error = Database::open(&path, ME).err().expect("refused").to_string();
    assert!(error.contains("0202020202020202") && error.contains("0101010101010101"), "{error}");
    let opened = Database::open(&path, other).expect("opens again");
    assert_eq!(starts(&opened), Some(&Record::Starts(7)));
    drop(opened);
    let replaced = Database::replace(&path, ME, error).expect("an empty one");
    let (aside, _) = replaced.quarantined.as_ref().expect("moved aside");
    assert!(replaced.records.is_empty());
    let opened = Database::open(aside, other).expect("opens again");
    let counts = opened.database.sled.as_ref().expect("open").open_tree(COUNTS).expect("a tree");
    counts.remove(NODE).expect("removed");
    drop((opened, counts));
    let opened = Database::open(aside, ME).expect("opens again");
    assert_eq!(starts(&opened), Some(&Record::Starts(7)));
}

#[test]
fn empty_value_removes_a_record() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("db");
    let database = Database::open(&path, ME).expect("opens").database;
    write(&database, 7);
    database.write(&BTreeMap::from([(Key::Starts, Vec::new())])).expect("written");
    drop(database);
    assert!(Database::open(&path, ME).expect("opens again").records.is_empty());
}

#[test]
fn second_process_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("db");
    let _held = Database::open(&path, ME).expect("opens");
    let error = Database::open(&path, ME).err().expect("locked").to_string();
    assert!(error.contains("another gossamer"), "{error}");
}

#[test]
fn record_of_a_newer_version_is_refused_and_kept() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("db");
    let database = Database::open(&path, ME).expect("opens").database;
    let sled = database.sled.as_ref().expect("open");
    sled.insert("pods/10.42.7.2", Record::Starts(1).encode()).expect("written");
    sled.flush().expect("flushed");
    drop(database);
    for _ in 0..2 {
        let error = Database::open(&path, ME).err().expect("refused").to_string();
        assert!(error.contains("pods/10.42.7.2") && error.contains("newer"), "{error}");
    }
    assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1, "nothing moved aside");
}

#[test]
fn damage_ends_in_a_usable_database_and_never_in_a_wrong_record() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut quarantined = 0;
    for round in 0..24_usize {
        let path = dir.path().join(format!("db-{round}"));
        let database = Database::open(&path, ME).expect("opens").database;
        for value in 0..50 {
            write(&database, value);
            let filler = |bucket| (Key::Slots(bucket), Record::Starts(value).encode().repeat(20));
            database.write(&(0..32).map(filler).collect()).expect("written");
        }
        let intact = |bucket| (Key::Slots(bucket), Record::Slots(Vec::new()).encode());
        database.write(&(0..32).map(intact).collect()).expect("written");
        drop(database);
        let file = path.join("db");
        let mut bytes = fs::read(&file).expect("read");
        let at = bytes.len() * round / 24;
        match round % 3 {
            0 => bytes[at] ^= 0x55,
            1 => bytes.truncate(at),
            _ => bytes[at..].fill(0xff),
        }
        fs::write(&file, bytes).expect("damage");
        let opened = Database::open(&path, ME).expect("a usable database");
        quarantined += usize::from(opened.quarantined.is_some());
        if let Some(record) = starts(&opened) {
            assert!(matches!(record, Record::Starts(0..50)), "{record:?}");
        }
        write(&opened.database, 99);
    }
    assert!(quarantined > 0, "some damage must have been noticed");
}
