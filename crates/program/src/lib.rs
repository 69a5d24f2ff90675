//! The step program: emit, derive, schedule and place
