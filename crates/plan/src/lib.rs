//! Price a program in closed form and search layouts
