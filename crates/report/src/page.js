"use strict";
// A row and the shape that shows it light up together, under pointer and keyboard alike.
for (const figure of document.querySelectorAll("figure")) {
  const marked = [...figure.querySelectorAll("[data-mark]")];
  const light = (mark, on) => {
    for (const e of marked) if (e.dataset.mark === mark) e.classList.toggle("lit", on);
  };
  for (const e of marked) {
    const mark = e.dataset.mark;
    e.addEventListener("pointerenter", () => light(mark, true));
    e.addEventListener("pointerleave", () => light(mark, false));
    if (e.localName === "tr") {
      e.tabIndex = 0;
      e.addEventListener("focus", () => light(mark, true));
      e.addEventListener("blur", () => light(mark, false));
    }
  }
}
document.documentElement.dataset.ready = "yes";
