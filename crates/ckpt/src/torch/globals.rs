use crate::input::shown;

/// The names that a pickle may use. None of them is code here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Global {
    Metadata,
    TensorStorage,
    BytesStorage,
    TensorProperties,
    Chunk,
    Index,
    StorageMeta,
    StorageInfo,
    Size,
    OrderedDict,
    RebuildTensor,
    /// What a persistent id stands for.
    Persistent,
    /// What says nothing of where data lie: layouts, memory formats, paths.
    Nothing,
    Type(Element),
    Storage(Element),
}

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Element {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Element::F64 | Element::I64 => 8,
            Element::F32 | Element::I32 => 4,
            Element::F16 | Element::Bf16 | Element::I16 => 2,
            Element::I8 | Element::U8 | Element::Bool => 1,
        }
    }
}

const CHECKPOINT: &str = "torch.distributed.checkpoint.metadata";
/// Where releases before 2.4 had the properties of tensors.
const SHARDED: &str = "torch.distributed._shard.sharded_tensor.metadata";
const MEGATRON: &str = "megatron.core.dist_checkpointing.strategies.torch";

impl Global {
    /// # Errors
    /// The name that is not on the list.
    pub(crate) fn find(module: &str, name: &str) -> Result<Self, String> {
        use Element::{Bf16, Bool, F16, F32, F64, I8, I16, I32, I64, U8};
        Ok(match (module, name) {
            (CHECKPOINT, "Metadata") | (MEGATRON, "MCoreMetadata") => Global::Metadata,
            (CHECKPOINT, "TensorStorageMetadata") => Global::TensorStorage,
            (CHECKPOINT, "BytesStorageMetadata") => Global::BytesStorage,
            (CHECKPOINT | SHARDED, "TensorProperties") => Global::TensorProperties,
            (CHECKPOINT, "ChunkStorageMetadata") => Global::Chunk,
            (CHECKPOINT, "MetadataIndex") => Global::Index,
            (CHECKPOINT, "StorageMeta") => Global::StorageMeta,
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo") => Global::StorageInfo,
            ("torch", "Size") => Global::Size,
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            (CHECKPOINT, "_MEM_FORMAT_ENCODING")
            | (SHARDED, "MEM_FORMAT_ENCODING")
            | ("torch.serialization", "_get_layout")
            | ("pathlib" | "pathlib._local", "PosixPath") => Global::Nothing,
            ("torch", "float64") => Global::Type(F64),
            ("torch", "float32") => Global::Type(F32),
            ("torch", "float16") => Global::Type(F16),
            ("torch", "bfloat16") => Global::Type(Bf16),
            ("torch", "int64") => Global::Type(I64),
            ("torch", "int32") => Global::Type(I32),
            ("torch", "int16") => Global::Type(I16),
            ("torch", "int8") => Global::Type(I8),
            ("torch", "uint8") => Global::Type(U8),
            ("torch", "bool") => Global::Type(Bool),
            ("torch", "DoubleStorage") => Global::Storage(F64),
            ("torch", "FloatStorage") => Global::Storage(F32),
            ("torch", "HalfStorage") => Global::Storage(F16),
            ("torch", "BFloat16Storage") => Global::Storage(Bf16),
            ("torch", "LongStorage") => Global::Storage(I64),
            ("torch", "IntStorage") => Global::Storage(I32),
            ("torch", "ShortStorage") => Global::Storage(I16),
            ("torch", "CharStorage") => Global::Storage(I8),
            ("torch", "ByteStorage") => Global::Storage(U8),
            ("torch", "BoolStorage") => Global::Storage(Bool),
            _ => return Err(format!("the name {} of {} is not on the list", shown(name), shown(module))),
        })
    }

    /// Whether objects of it are made without a call.
    pub(crate) fn is_class(self) -> bool {
        matches!(
            self,
            Global::Metadata
                | Global::TensorStorage
                | Global::BytesStorage
                | Global::TensorProperties
                | Global::Chunk
                | Global::Index
                | Global::StorageMeta
                | Global::StorageInfo
        )
    }
}
