//! What checkpoints need of an object store, asked of a real server.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use object_store::aws::{AmazonS3Builder, S3ConditionalPut};

use super::http::Connector;
use super::server::{BUCKET, Server, request};
use super::signing::Crypto;
use super::{Bucket, connect};

/// Three parts of an upload, the last one shorter.
const LARGE_BYTES: usize = (20 << 20) + 12_345;

/// Writers that all want to be the one who commits.
const RACERS: usize = 8;

/// A prefix of its own in the bucket of `server`.
fn bucket(server: &Server) -> Bucket {
    let store = AmazonS3Builder::new()
        .with_endpoint(format!("http://{}", server.address))
        .with_allow_http(true)
        .with_bucket_name(BUCKET)
        .with_region("us-east-1")
        .with_access_key_id("test")
        .with_secret_access_key("test")
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_http_connector(Connector)
        .with_crypto_provider(Arc::new(Crypto))
        .build()
        .expect("a store");
    connect::place("real://server", Arc::new(store));
    let url = PathBuf::from(format!("real://server/conformance-{}", std::process::id()));
    Bucket::at(&url).expect("a bucket")
}

#[test]
fn a_real_store_does_what_checkpoints_need() {
    let Some(server) = Server::start() else { return };
    let bucket = bucket(&server);
    let put = |name: &str, text: &str| bucket.create(name, text.as_bytes()).expect("an answer");
    let text = |name: &str| {
        let found = bucket.read(name, 100).expect("an answer");
        found.map(|(bytes, version)| (String::from_utf8(bytes).expect("text"), version))
    };

    // A create-only put refuses, and what was there stays.
    assert!(put("commit", "first"));
    assert!(!put("commit", "second"));
    let (first, version) = text("commit").expect("it is there");
    assert_eq!(first, "first");
    let wins = thread::scope(|scope| {
        let race = |i: usize| bucket.create("race", format!("{i}").as_bytes()).expect("an answer");
        let all: Vec<_> = (0..RACERS).map(|i| scope.spawn(move || race(i))).collect();
        all.into_iter().map(|t| t.join().expect("no panic")).filter(|won| *won).count()
    });
    assert_eq!(wins, 1, "one of {RACERS} writers wins");

    // A version is replaced once.
    let (_, stale) = text("commit").expect("it is there");
    assert!(bucket.replace("commit", b"second", version).expect("an answer"));
    assert!(!bucket.replace("commit", b"third", stale).expect("an answer"));
    assert_eq!(text("commit").expect("it is there").0, "second");

    // A list shows what was put, at once; ranges are those of what was put in parts.
    let large: Vec<u8> = (0..LARGE_BYTES).map(|i| (i * i / 7) as u8).collect();
    let mut upload = bucket.upload("in/parts", large.len() as u64);
    large.chunks(1 << 20).for_each(|part| upload.write_all(part).expect("taken"));
    let parts = bucket.inside("in");
    assert_eq!(parts.files().expect("a list"), [], "not there before it is whole");
    upload.finish().expect("written");
    assert_eq!(parts.files().expect("a list"), [("parts".to_owned(), large.len() as u64)]);
    assert_eq!(bucket.folders().expect("a list"), ["in"]);
    let ranges =
        [0..1, 8_388_600..8_388_620, 5_000_000..12_000_000, (large.len() - 3) as u64..large.len() as u64];
    let found = parts.ranges("parts", &ranges).expect("read");
    for (range, found) in ranges.iter().zip(found) {
        assert!(found == large[range.start as usize..range.end as usize], "{range:?}");
    }
    assert!(parts.read("parts", 100).is_err(), "it is longer than that");
    let end = large.len() as u64;
    assert!(parts.ranges("parts", &[0..1, end..end + 1]).is_err(), "there is nothing beyond the end");

    // An upload that is given up leaves nothing.
    let mut upload = bucket.upload("aborted", large.len() as u64);
    upload.write_all(&large[..LARGE_BYTES - 1]).expect("taken");
    drop(upload);
    assert!(text("aborted").is_none());
    let left = request(&server.address, &format!("GET /{BUCKET}?uploads HTTP/1.1"));
    assert!(left.contains("ListMultipartUploadsResult") && !left.contains("aborted"), "{left}");

    // What is removed is gone, and may be removed again.
    let names = ["commit", "race", "in/parts"].map(str::to_owned);
    assert_eq!(bucket.have(&names).expect("an answer"), [true; 3]);
    bucket.remove(&names).expect("removed");
    bucket.remove(&names).expect("removed again");
    assert_eq!(bucket.have(&names).expect("an answer"), [false; 3]);
    // Some servers show the folder for a while.
    assert_eq!(parts.files().expect("a list"), []);
}
