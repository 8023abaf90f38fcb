"use strict";
(() => {
  const data = JSON.parse(document.getElementById("frames").textContent);
  const gallery = document.getElementById("gallery");
  const slider = document.getElementById("iteration");
  const last = (list, i) => list[Math.min(i, list.length - 1)];
  const show = () => {
    const i = Number(slider.value);
    const sample = Number(gallery.querySelector("[name=sample]:checked").value);
    slider.setAttribute("aria-valuetext", `iteration ${data.iterations[i]}`);
    document.getElementById("shown").textContent = data.iterations[i];
    for (const image of gallery.querySelectorAll("img[data-column]")) {
      const column = data.columns[image.dataset.column];
      image.parentElement.querySelector("[data-score]").textContent =
        last(column.scores, i)[image.dataset.prompt][sample];
      image.src = data.images[last(column.frames, i)[image.dataset.prompt][sample]];
      image.dataset.iteration = last(column.at, i);
      image.dataset.sample = sample;
    }
    for (const stat of gallery.querySelectorAll("[data-stat]")) {
      const column = data.columns[stat.dataset.stat];
      const at = stat.querySelector("[data-at]");
      if (at) at.textContent = last(column.at, i);
      stat.querySelectorAll("[data-reward]").forEach((place) => {
        place.textContent = last(column.values, i)[place.dataset.reward];
      });
    }
  };
  gallery.querySelector(".slide").hidden = false;
  gallery.addEventListener("input", show);
  show(); // a browser that goes back keeps the slider where it was
})();
