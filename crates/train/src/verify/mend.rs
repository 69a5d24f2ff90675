//! What ranks hold made right again from those that hold it as it should be; and, for drills, made wrong.

use spec::{DType, Error, Result};

use super::{Finding, Held, Part, Store};
use crate::exec::Executor;
use crate::launch::Operand;
use crate::resolve;

impl Executor {
    /// Gives each rank that `findings` name what the first of its peers holds; collective. One after the other, so that
    /// memory holds one parameter more at most.
    ///
    /// # Errors
    /// If a finding has no peers, or a rank is lost.
    pub(crate) fn mend(&mut self, held: &Held, findings: &[Finding]) -> Result<()> {
        let rank = self.program.rank;
        for f in findings {
            let Some(giver) = f.peers.first() else {
                return Err(Error::failure(format!("{f}: nobody holds it as it should be")));
            };
            let part = held.parts.iter().find(|p| p.key == f.key).map(|part| self.operand(part));
            let mut given = Vec::new();
            if let Some(at) = part.filter(|_| rank == *giver) {
                given.resize(at.bytes(), 0);
                self.device.copy_out(at, &mut given)?;
            }
            let all = self.mesh.exchange(&given)?;
            if let Some(at) = part.filter(|_| f.ranks.contains(&rank)) {
                let bytes = &all[*giver];
                if bytes.len() != at.bytes() {
                    let (sent, wanted) = (bytes.len(), at.bytes());
                    return Err(Error::failure(format!("{}: {sent} bytes came of {wanted}", f.what)));
                }
                self.device.copy_in(at, bytes)?;
            }
        }
        Ok(())
    }

    /// Flips a bit of the first element that this rank holds of a parameter: a drill.
    ///
    /// # Errors
    /// If the device is lost, or the rank holds nothing of it.
    pub(crate) fn flip(&mut self, name: &str, bit: u32) -> Result<()> {
        let held = self.held()?;
        // What the run's weights are: masters, where there are any.
        let of = |store| held.parts.iter().find(|p| p.name == name && p.store == store && p.count > 0);
        let Some(part) = of(Store::Master).or(of(Store::Param)) else {
            let rank = self.program.rank;
            return Err(Error::user(format!("drill: rank {rank} holds nothing of {name}")).hint(
                "phalanx ckpt show lists parameters; pipelines and ZeRO 3 leave a rank some of them only",
            ));
        };
        let at = self.operand(part).part(0, 1);
        let mut bytes = vec![0; at.bytes()];
        self.device.copy_out(at, &mut bytes)?;
        let bit = bit as usize % (8 * bytes.len());
        bytes[bit / 8] ^= 1 << (bit % 8);
        self.device.copy_in(at, &bytes)
    }

    fn operand(&self, part: &Part) -> Operand {
        debug_assert!(matches!(self.program.buffer(part.buffer).dtype, DType::F32 | DType::Bf16));
        resolve::whole(&self.program, part.buffer).part(part.first, part.count)
    }
}
