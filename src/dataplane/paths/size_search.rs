//! The search for the largest size that passes, while full-size packets are lost.

/// The state of the search. Sizes are reductions: bytes less than the full size.
#[derive(Clone, Copy, Debug)]
pub(super) struct SizeSearch {
    /// The largest reduction with which a packet was lost.
    pub(super) lost: u32,
    /// The smallest reduction with which a packet was answered.
    pub(super) answered: Option<u32>,
}

impl SizeSearch {
    /// Reductions, in bytes, that are tried until one is answered: headers of tunnels on the way, a switch
    /// that carries no jumbo frames, and the largest MTU.
    const FIRST_REDUCTIONS: [u32; 3] = [512, 8_192, 65_536];
    /// The search ends at this difference in bytes between a size that passes and one that does not.
    const PRECISION: u32 = 8;

    /// Returns the next reduction to try; `None` if the result is known, or no size passes.
    pub(super) fn next(self) -> Option<u32> {
        match self.answered {
            None => Self::FIRST_REDUCTIONS.into_iter().find(|reduction| self.lost < *reduction),
            Some(answered) if answered - self.lost <= Self::PRECISION => None,
            Some(answered) => Some(self.lost.midpoint(answered)),
        }
    }
}
