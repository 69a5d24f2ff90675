//! Permutations and sampler indices equal to PyTorch's (`golden/randperm.py`).

use data::{DistributedSampler, torch_randperm};
use serde_json::Value;

fn golden(section: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(include_str!("golden/randperm.json")).unwrap();
    all[section].as_array().unwrap().clone()
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect()
}

/// `sum((i + 1) * v[i]) mod (2^61 - 1)`, as the script has it.
fn checksum(values: &[u64]) -> u64 {
    const MODULUS: u128 = (1 << 61) - 1;
    let sum = values.iter().zip(1u128..).fold(0, |sum, (&v, i)| (sum + i * u128::from(v)) % MODULUS);
    sum as u64
}

#[test]
fn permutations() {
    for case in golden("permutations") {
        let order = torch_randperm(case["n"].as_u64().unwrap(), case["seed"].as_u64().unwrap());
        let first = numbers(&case["first"]);
        assert_eq!(order[..first.len()], first);
        assert_eq!(checksum(&order), case["checksum"].as_u64().unwrap());
    }
}

#[test]
fn samplers() {
    for case in golden("samplers") {
        let [n, replicas, epoch, seed] =
            ["n", "replicas", "epoch", "seed"].map(|k| case[k].as_u64().unwrap());
        let sums = numbers(&case["checksums"]);
        for replica in 0..replicas {
            let sampler = DistributedSampler::new(n, replicas, replica)
                .unwrap()
                .seed(seed)
                .shuffle(case["shuffle"].as_bool().unwrap())
                .drop_last(case["drop_last"].as_bool().unwrap());
            let indices = sampler.indices(epoch);
            let first = numbers(&case["indices"][replica as usize]);
            assert_eq!(indices[..first.len()], first, "{case}");
            assert_eq!(checksum(&indices), sums[replica as usize], "{case}");
            assert_eq!(indices.len() as u64, sampler.samples());
        }
    }
}
