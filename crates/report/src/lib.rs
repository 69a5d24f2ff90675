//! Answers as pages: figures drawn here as SVG, the numbers behind them as tables, in one file that needs no network.

pub mod compare;
pub mod decide_page;
mod figures;
pub mod guide_page;
pub mod inference_page;
mod page;
mod plan_page;
mod sources;
mod svg;
mod table;
mod text;

pub use figures::Figure;
pub use page::data_of;
pub use plan_page::{Report, Scale, plan_page, scales};
