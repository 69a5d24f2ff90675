use super::*;
use crate::tree::is_subtree;

/// Collectives in two levels: within each host through memory, across hosts once per share.
pub(super) struct Hosts<'a> {
    pub(super) near: Meeting<'a>,
    pub(super) across: Exchange<'a>,
}

impl Hosts<'_> {
    /// Whether summing within hosts first keeps the order: a host's members must be a subtree.
    pub(super) fn keeps(&self, order: Order) -> bool {
        let local = self.near.near.ranks.len();
        order == Order::Ring || is_subtree(local * self.across.mesh.ranks.len(), local)
    }

    /// Partial sums keep the precision that they are added in: rounding comes once, at the end.
    pub(super) fn wide(element: ElementType) -> ElementType {
        if element == ElementType::Bf16 { ElementType::F32 } else { element }
    }

    pub(super) async unsafe fn all_reduce(&self, buffer: RawSlice) -> Result<()> {
        let (n, me, wide) = (self.near.near.ranks.len(), self.near.near.me, Hosts::wide(buffer.element));
        let shares: Vec<_> = (0..n).map(|m| shares::aligned(buffer.count, n, m)).collect();
        let own = buffer.part(&shares[me]);
        let mut scratch = self.across.mesh.scratch(own.count * wide.bytes());
        let sum = RawSlice::new(scratch.at(0).0, own.count, wide);
        // SAFETY: passed on from the caller; the scratch is large enough and nobody else's.
        unsafe {
            self.near.reduce_scatter(buffer, Address(sum.as_ptr()), Into::F32, &shares).await?;
            self.across.all_reduce(sum).await?;
            round(buffer.element, sum.as_ptr(), own.as_ptr(), own.count);
            self.near.all_gather(own, buffer, &shares).await
        }
    }

    /// The ranges of the members of one host.
    pub(super) fn of_host<'r>(&self, ranges: &'r [Range<usize>], host: usize) -> &'r [Range<usize>] {
        let local = self.near.near.ranks.len();
        &ranges[host * local..(host + 1) * local]
    }

    pub(super) async unsafe fn reduce_scatter(
        &self,
        input: RawSlice,
        output: RawSlice,
        ranges: &[Range<usize>],
    ) -> Result<()> {
        let (me, hosts, here) = (self.near.near.me, self.across.mesh.ranks.len(), self.across.mesh.me);
        let wide = Hosts::wide(input.element);
        // One share per host, side by side: what this rank and its counterparts own.
        let mut shares = Vec::with_capacity(hosts);
        let mut end = 0;
        for host in 0..hosts {
            let len = self.of_host(ranges, host)[me].len();
            shares.push(end..end + len);
            end += len;
        }
        let mut scratch = self.across.mesh.scratch(end * wide.bytes());
        let sums = RawSlice::new(scratch.at(0).0, end, wide);
        // SAFETY: passed on from the caller; the scratch is large enough and nobody else's.
        unsafe {
            for host in 0..hosts {
                let place = sums.part(&shares[host]);
                self.near
                    .reduce_scatter(input, Address(place.as_ptr()), Into::F32, self.of_host(ranges, host))
                    .await?;
            }
            let own = sums.part(&shares[here]);
            self.across.reduce_scatter(sums, Address(own.as_ptr()), Into::Same, &shares).await?;
            round(input.element, own.as_ptr(), output.as_ptr(), output.count);
        }
        Ok(())
    }

    pub(super) async unsafe fn all_gather(
        &self,
        input: RawSlice,
        output: RawSlice,
        ranges: &[Range<usize>],
    ) -> Result<()> {
        let (me, hosts, local) =
            (self.near.near.me, self.across.mesh.ranks.len(), self.near.near.ranks.len());
        let column: Vec<_> = ranges.iter().skip(me).step_by(local).cloned().collect();
        // SAFETY: passed on from the caller.
        unsafe {
            self.across.all_gather(input, output, &column).await?;
            for host in 0..hosts {
                let ranges = self.of_host(ranges, host);
                self.near.all_gather(output.part(&ranges[me]), output, ranges).await?;
            }
        }
        Ok(())
    }
}
