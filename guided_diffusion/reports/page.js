"use strict";
// All that needs a script: the sliders. Without it the last grids are shown.
document.documentElement.classList.add("scripted");
for (const film of document.querySelectorAll(".film")) {
  const slider = film.querySelector("input[type=range]");
  if (!slider) continue;
  const frames = [...film.querySelectorAll(".frame")];
  const show = () => {
    frames.forEach((frame, i) => { frame.hidden = i !== Number(slider.value); });
    const step = frames[Number(slider.value)].dataset.step;
    film.querySelector("output").textContent = Number(step).toLocaleString("en");
    slider.setAttribute("aria-valuetext", "iteration " + step);
  };
  slider.addEventListener("input", show);
  show(); // a browser may have restored another value
}
