//! What people type finds the machine that they mean, says what else it could be, or why there is none.

use plan::strategy::Strategy;
use spec::Catalog;

fn check(catalog: &Catalog, typed: &str, name: &str) {
    let cluster = catalog.cluster(typed, None).unwrap_or_else(|e| panic!("{typed}: {e}"));
    assert_eq!(cluster.name, name, "{typed}");
}

#[test]
fn platforms_and_nodes_answer_to_the_names_people_type() {
    let catalog = Catalog::builtin().unwrap();
    for (typed, name) in [
        ("dgx superpod h100", "dgx-superpod-h100"),
        ("SuperPOD-H100", "dgx-superpod-h100"),
        ("DGX SuperPOD GB200 8SU", "dgx-superpod-gb200-8su"),
        ("superpod-a100-7su", "dgx-superpod-a100-7su"),
        ("dgx_superpod_b200_1su", "dgx-superpod-b200-1su"),
        ("colossus", "xai-colossus"),
        ("nd-h100-v5", "azure-nd-h100-v5"),
        ("ND96isr-H100-v5", "azure-nd-h100-v5"),
        ("Standard_ND96isr_H100_v5", "azure-nd-h100-v5"),
        ("Standard_ND96amsr_A100_v4", "azure-nd-a100-v4"),
        ("a3-mega", "gcp-a3-mega"),
        ("a3-megagpu-8g", "gcp-a3-mega"),
        ("a2-ultragpu-8g", "gcp-a2-ultra"),
        ("a4-highgpu-8g", "gcp-a4"),
        ("p3.16xlarge", "aws-p3"),
        ("p4d.24xlarge", "aws-p4d"),
        ("p5", "aws-p5"),
        ("p5e", "aws-p5e"),
        ("p5en.48xlarge", "aws-p5en"),
        ("p6-b200", "aws-p6-b200"),
        ("g5.48xlarge", "aws-g5"),
        ("g6e.48xlarge", "aws-g6e"),
        ("trn1", "aws-trn1"),
        ("trn2", "aws-trn2"),
        ("BM.GPU.H100.8", "oci-h100"),
        ("gpu_8x_h100_sxm5", "lambda-h100"),
        ("RSC", "meta-rsc"),
        ("meta-24k", "meta-24k-roce"),
        ("ironwood-pod", "tpu-v7x-pod"),
        ("v5p-pod", "tpu-v5p-pod"),
        ("eagle", "azure-eagle"),
        ("gb200-nvl72", "gb200-nvl72"),
        ("dgx-h100", "dgx-h100"),
        ("hgx h100", "dgx-h100"),
        ("dgx spark", "dgx-spark"),
    ] {
        check(&catalog, typed, name);
    }
}

#[test]
fn chips_stand_for_their_usual_machine() {
    let catalog = Catalog::builtin().unwrap();
    for (typed, name) in [
        ("h100", "dgx-h100"),
        ("H100 SXM5", "dgx-h100"),
        ("a100", "dgx-a100"),
        ("h200", "dgx-h200"),
        ("b200", "dgx-b200"),
        ("gb200", "gb200-nvl72"),
        ("mi300x", "mi300x-node"),
        ("mi325x", "mi325x-node"),
        ("mi250x", "frontier-node"),
        ("gaudi2", "gaudi2-node"),
        ("gaudi 3", "gaudi3-node"),
        ("v100", "dgx-v100"),
        ("h20", "hgx-h20"),
        ("h800", "hgx-h800"),
        ("a800", "hgx-a800"),
        ("h100-pcie", "h100-pcie"),
        ("h100 nvl", "h100-nvl"),
        ("a6000", "rtx-a6000"),
        ("rtx a6000", "rtx-a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("rtx5090", "rtx-5090"),
        ("3090", "rtx-3090"),
        ("rtx 6000 ada", "rtx-6000-ada"),
        ("l40s", "l40s"),
        ("l4", "l4"),
        ("a10g", "a10g"),
        ("t4", "t4"),
        ("gh200", "gh200"),
        ("gb10", "dgx-spark"),
        ("tpu-v5p", "tpu-v5p-pod"),
        ("trillium", "tpu-v6e-pod"),
        ("ironwood", "tpu-v7x-pod"),
    ] {
        check(&catalog, typed, name);
    }
}

#[test]
fn the_guides_names_are_known() {
    let catalog = Catalog::builtin().unwrap();
    for (typed, name) in [
        ("NVIDIA DGX SuperPOD", "dgx-superpod-h100"),
        ("Microsoft Azure AI (OpenAI Cluster)", "azure-eagle"),
        ("Google TPU v5p Pods", "tpu-v5p-pod"),
        ("Meta AI Research SuperCluster (RSC)", "meta-rsc"),
        ("xAI Colossus", "xai-colossus"),
        ("CoreWeave", "coreweave-h100"),
        ("Lambda Labs", "lambda-h100"),
        ("AWS p5.48xlarge", "aws-p5"),
        ("AWS p5.48xlarge (8x H100)", "aws-p5"),
        ("TPU v5p", "tpu-v5p-pod"),
        ("TPU Pods", "tpu-v5p-pod"),
        ("DGX H100", "dgx-h100"),
        ("NVIDIA H100 SXM5", "dgx-h100"),
        ("H100 PCIe", "h100-pcie"),
        ("NVIDIA A100", "dgx-a100"),
    ] {
        check(&catalog, typed, name);
    }
    for part in [
        "NVLink / NVSwitch",
        "NVLink 4.0",
        "InfiniBand NDR (400Gbps)",
        "NDR400",
        "InfiniBand",
        "High-Bandwidth Memory (HBM3)",
        "HBM3",
        "Parallel Filesystem (Lustre/GPFS)",
        "High-Speed Storage for Checkpointing",
        "GPU (H100 SXM5)",
        "CoreWeave",
        "Corelink",
        "Google TPU v5p Pods",
        "AWS p5.48xlarge (8x H100)",
        "dgx-superpod-h100-64su",
    ] {
        assert!(catalog.named(part).is_ok(), "{part}");
    }
    for strategy in [
        "Data Parallelism (DDP)",
        "Tensor Parallelism",
        "Pipeline Parallelism",
        "3D Parallelism",
        "Zero Redundancy Optimizer (ZeRO)",
        "DeepSpeed ZeRO-3",
    ] {
        assert!(Strategy::find(strategy).is_some(), "{strategy}");
    }
}

#[test]
fn a_name_of_several_machines_says_which_it_took() {
    let catalog = Catalog::builtin().unwrap();
    let check = |typed: &str, taken: &str, also: &str| {
        let doubt = catalog.meaning(typed).unwrap().doubt(typed).unwrap_or_default();
        let begins = format!("\"{typed}\" is taken for {taken}; it could also be ");
        assert!(doubt.starts_with(&begins) && doubt.contains(also), "{typed}: {doubt}");
    };
    check("azure-openai", "azure-eagle", "azure-openai-2020");
    check("azure-openai", "azure-eagle", "azure-nd-a100");
    check("superpod", "dgx-superpod-h100", "dgx-superpod-gb200");
    check("h100", "dgx-h100", "aws-p5");
    check("tpu", "tpu-v5p-pod", "tpu-v6e-pod");
    for typed in ["dgx-h100", "p5", "rtx-4090", "a6000", "tpu-v5p", "azure-openai-2020"] {
        assert_eq!(catalog.meaning(typed).unwrap().doubt(typed), None, "{typed}");
    }
}

#[test]
fn a_slice_of_tpus_is_as_large_as_its_name_says() {
    let catalog = Catalog::builtin().unwrap();
    let check = |typed: &str, accelerators: usize, domain: usize| {
        let cluster = catalog.cluster(typed, None).unwrap();
        assert_eq!((cluster.accelerators, cluster.scale_up.domain), (accelerators, domain), "{typed}");
    };
    check("v5p-512", 256, 256);
    check("v5litepod-256", 256, 256);
    check("tpu-v6e-64", 64, 64);
    check("v4-2048", 1024, 1024);
}

#[test]
fn several_pods_are_joined_in_slices_of_one_size() {
    let catalog = Catalog::builtin().unwrap();
    let check = |name: &str, accelerators: usize, slice: usize| {
        let cluster = catalog.cluster(name, Some(accelerators)).unwrap();
        assert_eq!((cluster.accelerators, cluster.scale_up.domain), (accelerators, slice), "{name}");
        let slices = accelerators / slice;
        let said = cluster
            .assumptions
            .iter()
            .any(|a| a.starts_with(&format!("{slices} slices of {slice}, joined by")));
        assert_eq!(said, slices > 1, "{name}: {:?}", cluster.assumptions);
    };
    check("tpu-v5e-pod", 256, 256);
    check("tpu-v5e-pod", 1024, 256);
    check("tpu-v5e-pod", 50_944, 256);
    check("tpu-v5e-pod", 384, 192);
    check("tpu-v5p-pod", 12_288, 6144);
    check("tpu-v5p-pod", 8960, 4480);
    check("tpu-v4-pod", 6144, 3072);
    let error = catalog.cluster("tpu-v5e-pod", Some(257)).unwrap_err();
    assert!(error.to_string().contains("no equal slices"), "{error}");
    assert!(error.hint_text().unwrap().contains("--accelerators 512"), "{:?}", error.hint_text());
}

#[test]
fn what_is_no_machine_says_so_and_what_to_do() {
    let catalog = Catalog::builtin().unwrap();
    let check = |typed: &str, what: &str, hint: &str| {
        let error = catalog.cluster(typed, None).unwrap_err();
        assert!(error.to_string().contains(what), "{typed}: {error}");
        assert!(error.hint_text().unwrap().contains(hint), "{typed}: {:?}", error.hint_text());
    };
    check("h100 superpod", "unknown cluster", "superpod-h100");
    check("collosus", "unknown cluster", "colossus");
    check("nd-h100-v6", "unknown cluster", "nd-h100-v5");
    check("my-cluster", "unknown cluster", "--catalog");
    check("my-cluster", "unknown cluster", "list node");
    check("my-cluster", "unknown cluster", "--accelerators");
    check("dgx-superpod-h100-65su", "has 1 to 64", "dgx-superpod-h100-64su");
    check("Corelink", "no public figures", "ask Corelink for a quote");
    check("NVLink", "a part of machines", "catalog show nvlink");
    let error = catalog.cluster("rtx-4090", Some(9)).unwrap_err();
    assert!(error.to_string().contains("up to 8"), "{error}");
    assert!(error.hint_text().unwrap().contains("--catalog"), "{:?}", error.hint_text());
}
