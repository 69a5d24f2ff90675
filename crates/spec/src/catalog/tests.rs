use super::*;

#[test]
fn the_builtin_catalogue_is_whole() {
    let catalog = Catalog::builtin().unwrap();
    let checked = catalog.check().unwrap();
    assert!(checked.numbers > 700 && checked.ranges > 50 && checked.platforms > 35, "{checked:?}");
}

#[test]
fn platforms_of_the_guide_have_their_published_sizes() {
    let catalog = Catalog::builtin().unwrap();
    let check = |name: &str, accelerators: usize, chip: &str| {
        let cluster = catalog.cluster(name, None).unwrap();
        assert_eq!((cluster.accelerators, cluster.accelerator.name.as_str()), (accelerators, chip), "{name}");
    };
    check("dgx-superpod-h100-1su", 248, "h100-sxm5");
    check("dgx-superpod-h100-4su", 1016, "h100-sxm5");
    check("dgx-superpod-h100-8su", 2048, "h100-sxm5");
    check("dgx-superpod-h100-64su", 16_384, "h100-sxm5");
    check("dgx-superpod-a100-7su", 1120, "a100-80-sxm");
    check("dgx-superpod-h200-64su", 16_384, "h200-sxm");
    check("dgx-superpod-b200-64su", 16_384, "b200-sxm");
    check("dgx-superpod-gb200-1su", 576, "gb200");
    check("azure-openai-2020", 10_000, "v100-sxm2");
    check("azure-eagle", 14_400, "h100-sxm5");
    check("azure-gb300", 4608, "gb300");
    check("tpu-v4-pod", 4096, "tpu-v4");
    check("tpu-v5p-pod", 6144, "tpu-v5p");
    check("tpu-v5e-pod", 256, "tpu-v5e");
    check("trillium-pod", 256, "tpu-v6e");
    check("ironwood-pod", 9216, "tpu-v7x");
    check("meta-rsc", 16_000, "a100-80-sxm");
    check("meta-24k-roce", 24_576, "h100-sxm5");
    check("xai-colossus", 100_000, "h100-sxm5");
    check("dgx-h100", 8, "h100-sxm5");
}

#[test]
fn rates_are_one_way_and_ports_are_shared_out() {
    let catalog = Catalog::builtin().unwrap();
    let cluster = catalog.cluster("dgx-h100", Some(16)).unwrap();
    assert_eq!(cluster.scale_up.bytes_per_s.value, 450e9);
    assert_eq!(cluster.scale_out.bytes_per_s.value, 50e9);
    assert_eq!(cluster.accelerator.peak(crate::NumberFormat::Bf16).unwrap().value, 989e12);
    assert_eq!(cluster.accelerator.peak(crate::NumberFormat::Fp4), None);
    let measured = |format| cluster.accelerator.matmul(format).map(|m| m.value);
    assert_eq!(measured(crate::NumberFormat::Bf16), Some(794.5e12));
    assert_eq!(measured(crate::NumberFormat::Fp8), Some(1402.6e12));
    assert_eq!(measured(crate::NumberFormat::Fp32), None);
}

const CHIP: &str = r#"
[accelerator.mine]
vendor = "me"
family = "hopper"
link = "switch"
peak.bf16 = { value = 2000, unit = "TFLOP/s", sparsity = "sparse", source = "my lab book", date = "2026-01-31" }
memory = { value = 80, unit = "GiB", source = "my lab book", date = "2026" }
memory_bandwidth = { value = 3, unit = "TB/s", source = "my lab book", date = "2026" }
scale_up = { value = 900, unit = "GB/s", direction = "both-ways", source = "my lab book", date = "2026" }
peer = { value = 450, unit = "GB/s", direction = "one-way", source = "my lab book", date = "2026" }
domain = { value = 8, unit = "accelerators", source = "my lab book", date = "2026" }
[node.mine]
accelerator = "mine"
fabric = "ib-ndr"
accelerators = { value = 8, unit = "accelerators", source = "my lab book", date = "2026" }
scale_out = { value = 400, unit = "Gb/s", direction = "one-way", source = "my lab book", date = "2026" }
[platform.mine]
node = "mine"
nodes = { value = 4, unit = "nodes", source = "my lab book", date = "2026" }
"#;

#[test]
fn a_users_file_adds_a_platform_and_is_converted() {
    let catalog = Catalog::with_files(&[("mine.toml", CHIP)]).unwrap();
    let cluster = catalog.cluster("mine", None).unwrap();
    assert_eq!(cluster.accelerators, 32);
    assert_eq!(cluster.accelerator.peak(crate::NumberFormat::Bf16).unwrap().value, 1000e12);
    assert_eq!(cluster.scale_up.bytes_per_s.value, 450e9);
    assert_eq!(cluster.accelerator.memory_bytes.value, 80.0 * 1024f64.powi(3));
}

/// Replaces a piece of the good file and expects the message to hold all of `parts`.
fn check_bad(from: &str, to: &str, parts: &[&str]) {
    assert!(CHIP.contains(from), "{from}");
    let error = Catalog::with_files(&[("mine.toml", &CHIP.replacen(from, to, 1))]).unwrap_err();
    let message = format!("{error} | {}", error.hint_text().unwrap_or_default());
    for part in parts {
        assert!(message.contains(part), "`{message}` lacks `{part}`");
    }
}

#[test]
fn bad_files_say_file_line_key_and_cure() {
    check_bad(
        ", unit = \"GiB\"",
        "",
        &["mine.toml:7", "accelerator.mine.memory has no unit", "a number is written"],
    );
    check_bad(
        "unit = \"GiB\", source = \"my lab book\"",
        "unit = \"GiB\"",
        &["mine.toml:7", "has no source"],
    );
    check_bad(
        "source = \"my lab book\", date = \"2026-01-31\"",
        "source = \"my lab book\"",
        &["has no date"],
    );
    check_bad("2026-01-31", "31.1.2026", &["expected YYYY"]);
    check_bad("\"GiB\"", "\"GB/s\"", &["memory is a capacity", "units are B, MB, GB"]);
    check_bad("direction = \"both-ways\", ", "", &["scale_up has no direction", "one-way or both-ways"]);
    check_bad("sparsity = \"sparse\", ", "", &["peak.bf16 has no sparsity", "dense or sparse"]);
    check_bad("value = 400", "value = 0", &["node.mine.scale_out", "above zero"]);
    check_bad("value = 400", "value = nan", &["node.mine.scale_out", "finite"]);
    check_bad("value = 400", "value = 400, low = 500, high = 600", &["outside its range"]);
    check_bad("memory = {", "memry = {", &["unknown key accelerator.mine.memry", "did you mean `memory`"]);
    check_bad(
        "accelerator = \"mine\"",
        "accelerator = \"h100-sxm\u{35}5\"",
        &["unknown accelerator", "did you mean"],
    );
    check_bad("fabric = \"ib-ndr\"", "fabric = \"ib-nrd\"", &["mine.toml:12", "node.mine.fabric", "ib-ndr"]);
    check_bad(
        "source = \"my lab book\", date = \"2026-01-31\"",
        "source = \"rx1\", date = \"2026\"",
        &["unknown source"],
    );
    check_bad("[platform.mine]", "[platform.mine]\nbase = \"mine\"", &["mine -> mine", "cycle"]);
    check_bad("[platform.mine]", "[platfrm.mine]", &["mine.toml:17", "unknown table [platfrm]"]);
    check_bad("value = 4,", "value = 4.5,", &["whole number"]);
    check_bad(
        "memory = { value = 80, unit = \"GiB\", source = \"my lab book\", date = \"2026\" }",
        "memory = 80",
        &["no unit, source and date"],
    );
    check_bad("vendor = \"me\"", "vendor = 3", &["mine.toml:3", "expected a string"]);
    check_bad("vendor = \"me\"", "vendor =", &["mine.toml:3", "not TOML"]);
}

#[test]
fn cycles_of_bases_are_named() {
    let text = "[fabric.a]\nbase = \"b\"\n[fabric.b]\nbase = \"c\"\n[fabric.c]\nbase = \"a\"\n";
    let error = Catalog::with_files(&[("x.toml", text)]).unwrap_err().to_string();
    assert!(error.contains("x.toml:1") && error.contains("a -> b -> c -> a"), "{error}");
}

#[test]
fn duplicates_and_unknown_names_are_refused_with_the_nearest() {
    let twice = [("a.toml", CHIP), ("b.toml", CHIP)];
    let error = Catalog::with_files(&twice).unwrap_err().to_string();
    assert!(error.contains("b.toml:2") && error.contains("a.toml:2"), "{error}");
    let catalog = Catalog::builtin().unwrap();
    let check = |name: &str, near: &str| {
        let error = catalog.cluster(name, None).unwrap_err();
        assert!(error.hint_text().unwrap().contains(near), "{error} {:?}", error.hint_text());
    };
    check("dgx-superpod-h10", "dgx-superpod-h100");
    check("meta-rcs", "meta-rsc");
    check("dgx-superpod-h100-65su", "dgx-superpod-h100-64su");
    check("zzzzzzzzzzzz", "catalog list");
}

#[test]
fn jobs_do_not_outgrow_their_machine() {
    let catalog = Catalog::builtin().unwrap();
    assert!(catalog.cluster("meta-rsc", Some(16_001)).is_err());
    assert!(catalog.cluster("dgx-h100", Some(0)).is_err());
    assert_eq!(catalog.cluster("tpu-v5e-pod", Some(4096)).unwrap().scale_up.domain, 256);
}

#[test]
fn show_prints_numbers_with_direction_source_and_date() {
    let catalog = Catalog::builtin().unwrap();
    let text = catalog.show("h100-sxm5").unwrap();
    assert!(text.contains("  scale_up          450 GB/s one way [ml 2026-08-22]"), "{text}");
    assert!(text.contains("  peak.bf16         989 TFLOP/s dense"), "{text}");
    assert!(text.contains("[ml] github.com/stas00"), "{text}");
    assert!(catalog.list(Some(EntryKind::Platform)).iter().any(|l| l.name == "xai-colossus"));
}

#[test]
fn families_say_how_their_matrix_units_take_work() {
    use crate::family::MatrixUnits::{Systolic, Tiles};
    let catalog = Catalog::builtin().unwrap();
    let check = |cluster: &str, units| {
        let family = catalog.cluster(cluster, None).unwrap().accelerator.family;
        assert_eq!(family.matrix_units, units, "{cluster}");
    };
    check("tpu-v5e-pod", Systolic);
    check("tpu-v5p-pod", Systolic);
    check("dgx-h100", Tiles);
    check("mi300x-node", Tiles);
}

#[test]
fn number_formats_read_back_by_name() {
    use crate::NumberFormat;
    let check = |name: &str, format| assert_eq!(NumberFormat::parse(name), format, "{name}");
    NumberFormat::all().for_each(|format| check(format.name(), Some(format)));
    check("bf16", Some(NumberFormat::Bf16));
    check("BF16", None);
    check("", None);
}
