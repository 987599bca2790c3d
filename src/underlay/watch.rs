//! Decides when a change of the underlay counts.
//!
//! An address that is missing for less than a second (DHCP renewal, a restarted network manager) changes
//! nothing, and a better default route counts after two seconds. A change that makes the present address
//! work again counts immediately. Pure: it reads no clock and no kernel.

use std::time::{Duration, Instant};

use super::{ChosenUnderlay, UnderlayCheck, UnderlayError};

/// Time for which the address may be missing.
const LOSS_GRACE: Duration = Duration::from_secs(1);
/// Time for which a better interface must exist.
const SETTLE_TIME: Duration = Duration::from_secs(2);
/// Time between two checks of the interfaces while there is no underlay or another one has appeared, in
/// addition to change notifications.
const RECHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The present underlay and pending changes.
#[derive(Debug)]
pub struct Watch {
    present: ChosenUnderlay,
    /// Since when the present address is missing.
    lost: Option<Instant>,
    /// A candidate to replace the present underlay, and since when it exists.
    candidate: Option<(ChosenUnderlay, Instant)>,
    /// The last reported problem.
    reported: Option<UnderlayError>,
    /// When to check again regardless of notifications.
    look_at: Option<Instant>,
}

impl Watch {
    /// Starts with the underlay chosen at startup. A remembered one is replaced as soon as another
    /// exists.
    pub fn new(now: Instant, present: ChosenUnderlay) -> Self {
        let look_at = (!present.is_present()).then_some(now);
        Self { present, lost: None, candidate: None, reported: None, look_at }
    }

    /// Returns the present underlay.
    pub const fn present(&self) -> &ChosenUnderlay {
        &self.present
    }

    /// Returns when to check the interfaces regardless of notifications.
    pub const fn due(&self) -> Option<Instant> {
        self.look_at
    }

    /// Processes a check of the interfaces. Returns a change: the new underlay, or a problem.
    pub fn step(
        &mut self,
        now: Instant,
        check: UnderlayCheck,
    ) -> Option<Result<ChosenUnderlay, UnderlayError>> {
        let change = match check.found {
            Ok(found) => self.on_found(now, found, check.present_holds).map(Ok),
            Err(error) => self.on_missing(now, error).map(Err),
        };
        let unsettled = self.lost.is_some() || self.candidate.is_some() || self.reported.is_some();
        self.look_at = unsettled.then(|| now + RECHECK_INTERVAL);
        change
    }

    fn on_found(
        &mut self,
        now: Instant,
        found: ChosenUnderlay,
        present_holds: bool,
    ) -> Option<ChosenUnderlay> {
        if found.local == self.present.local && found.name == self.present.name {
            (self.lost, self.candidate) = (None, None);
            let had_problem = self.reported.take().is_some();
            let is_news = found != self.present || had_problem;
            self.present.clone_from(&found);
            return is_news.then_some(found);
        }
        let wait = if !self.present.is_present() {
            Duration::ZERO
        } else if present_holds {
            SETTLE_TIME
        } else {
            LOSS_GRACE
        };
        self.lost = if present_holds { None } else { self.lost.or(Some(now)) };
        let (_, there_since) = self
            .candidate
            .take_if(|(candidate, _)| {
                candidate.local == found.local && candidate.name == found.name
            })
            .unwrap_or((found.clone(), now));
        // Without a working address, the candidate need not exist for any time itself.
        let since = if present_holds { there_since } else { self.lost.unwrap_or(there_since) };
        if now.saturating_duration_since(since) < wait {
            self.candidate = Some((found, there_since));
            return None;
        }
        (self.lost, self.reported) = (None, None);
        self.present.clone_from(&found);
        Some(found)
    }

    fn on_missing(&mut self, now: Instant, error: UnderlayError) -> Option<UnderlayError> {
        self.candidate = None;
        let since = *self.lost.get_or_insert(now);
        let patience = if self.present.is_present() { LOSS_GRACE } else { Duration::ZERO };
        let is_over = now.saturating_duration_since(since) >= patience;
        if !is_over || self.reported.as_ref() == Some(&error) {
            return None;
        }
        self.reported = Some(error.clone());
        Some(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(name: &str, last: u8, link: u32) -> ChosenUnderlay {
        ChosenUnderlay {
            name: name.to_owned(),
            link,
            ..ChosenUnderlay::remembered([192, 0, 2, last].into(), Some(1450))
        }
    }

    fn found(chosen: &ChosenUnderlay, present_holds: bool) -> UnderlayCheck {
        UnderlayCheck { found: Ok(chosen.clone()), present_holds }
    }

    fn nothing() -> UnderlayCheck {
        let error = UnderlayError::NoMatch { what: "gone".to_owned(), candidates: String::new() };
        UnderlayCheck { found: Err(error), present_holds: false }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn address_missing_for_less_than_a_second_changes_nothing() {
        let (start, eth0) = (Instant::now(), chosen("eth0", 1, 2));
        let mut watch = Watch::new(start, eth0.clone());
        assert_eq!(watch.due(), None, "a choice that stands needs no timer");
        assert_eq!(watch.step(start, nothing()), None);
        assert_eq!(watch.due(), Some(start + RECHECK_INTERVAL));
        assert_eq!(watch.step(start + ms(900), found(&eth0, true)), None);
        assert_eq!(watch.due(), None);
    }

    #[test]
    fn longer_missing_address_is_reported_once_and_its_return_immediately() {
        let (start, eth0) = (Instant::now(), chosen("eth0", 1, 2));
        let mut watch = Watch::new(start, eth0);
        assert_eq!(watch.step(start, nothing()), None);
        assert!(matches!(watch.step(start + ms(1000), nothing()), Some(Err(_))));
        assert_eq!(watch.step(start + ms(1500), nothing()), None);
        let again = chosen("eth0", 1, 7);
        let back = watch.step(start + ms(1600), found(&again, true));
        assert_eq!(back, Some(Ok(again)), "the interface was created again");
        assert_eq!(watch.due(), None);
    }

    #[test]
    fn better_interface_is_chosen_after_two_seconds() {
        let (start, eth0, lte) = (Instant::now(), chosen("eth0", 1, 2), chosen("wwan0", 9, 3));
        let mut watch = Watch::new(start, lte.clone());
        assert_eq!(watch.step(start, found(&eth0, true)), None);
        assert_eq!(watch.step(start + ms(1500), found(&lte, true)), None, "it went again");
        assert_eq!(watch.step(start + ms(1600), found(&eth0, true)), None);
        assert_eq!(watch.step(start + ms(3500), found(&eth0, true)), None);
        assert_eq!(watch.step(start + ms(3600), found(&eth0, true)), Some(Ok(eth0)));
    }

    #[test]
    fn replacement_of_lost_address_is_chosen_after_a_second() {
        let (start, old, new) = (Instant::now(), chosen("eth0", 1, 2), chosen("eth0", 2, 2));
        let mut watch = Watch::new(start, old);
        assert_eq!(watch.step(start, nothing()), None);
        assert_eq!(watch.step(start + ms(500), found(&new, false)), None);
        assert_eq!(watch.step(start + ms(1000), found(&new, false)), Some(Ok(new)));
    }

    #[test]
    fn host_without_network_chooses_first_address() {
        let (start, eth0) = (Instant::now(), chosen("eth0", 1, 2));
        let mut watch = Watch::new(start, ChosenUnderlay::remembered([192, 0, 2, 5].into(), None));
        assert_eq!(watch.due(), Some(start));
        assert!(matches!(watch.step(start, nothing()), Some(Err(_))));
        assert_eq!(watch.step(start + ms(500), nothing()), None);
        assert_eq!(watch.step(start + ms(1000), found(&eth0, false)), Some(Ok(eth0)));
        assert_eq!(watch.due(), None);
    }

    #[test]
    fn mtu_change_is_reported_immediately() {
        let (start, eth0) = (Instant::now(), chosen("eth0", 1, 2));
        let mut watch = Watch::new(start, eth0.clone());
        let narrow = ChosenUnderlay { mtu: 1350, ..eth0 };
        assert_eq!(watch.step(start, found(&narrow, true)), Some(Ok(narrow)));
    }
}
