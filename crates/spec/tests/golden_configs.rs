//! Configurations that transformers wrote, beside the weights that it saved for them.

use spec::ModelSpec;

/// Reads the config and compares the parameter count with the elements in the model's safetensors header.
fn check(name: &str, config: &str, safetensors: &[u8]) {
    let model = ModelSpec::from_hf_config(config).expect(name);
    assert_eq!(model.param_count(), elements(safetensors), "{name}");
    let again = model.to_hf_config().expect(name).to_string();
    assert_eq!(ModelSpec::from_hf_config(&again).expect(name), model, "{name}");
    assert_eq!(ModelSpec::from_toml(name, &model.to_toml()).expect(name), model, "{name}");
}

fn elements(safetensors: &[u8]) -> u64 {
    let (length, rest) = safetensors.split_at(8);
    let length = usize::try_from(u64::from_le_bytes(length.try_into().expect("eight bytes"))).expect("fits");
    let header: serde_json::Value = serde_json::from_slice(&rest[..length]).expect("a header");
    let tensors = header.as_object().expect("tensors").iter().filter(|(name, _)| *name != "__metadata__");
    tensors
        .map(|(_, tensor)| {
            tensor["shape"]
                .as_array()
                .expect("dims")
                .iter()
                .map(|d| d.as_u64().expect("a size"))
                .product::<u64>()
        })
        .sum()
}

macro_rules! golden {
    ($($test:ident $folder:literal)*) => {$(
        #[test]
        fn $test() {
            check(
                $folder,
                include_str!(concat!("../../../tests/golden/", $folder, "/config.json")),
                include_bytes!(concat!("../../../tests/golden/", $folder, "/model.safetensors")),
            );
        }
    )*};
}

golden! {
    gpt2 "gpt2"
    llama_gqa "llama-gqa"
    llama3_rope "llama3-rope"
    qwen2_like "qwen2-like"
    qwen3_like "qwen3-like"
    mixtral_like "mixtral-like"
    qwen3_moe_like "qwen3-moe-like"
}
