// Plain functions on what is in the page: nothing is loaded, and without scripts all is still shown.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [x, y] = [Number(a), Number(b)];
      return a === "" || b === "" ? (a === "") - (b === "")
        : Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : (down ? y - x : x - y);
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => order(value(a), value(b)));
    table.tBodies[0].append(...rows);
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }));
}
for (const box of document.querySelectorAll(".scroll")) {
  const look = () => { box.nextElementSibling.hidden = box.scrollWidth <= box.clientWidth + 1; };
  new ResizeObserver(look).observe(box);
  box.querySelectorAll("img").forEach(image => image.addEventListener("load", look));
  look();
}
const dialog = document.querySelector("dialog");
for (const image of document.querySelectorAll("figure img")) {
  image.tabIndex = 0;
  const open = () => {
    const large = dialog.querySelector("img");
    large.src = image.currentSrc || image.src;
    large.alt = image.alt;
    dialog.showModal();
  };
  image.addEventListener("click", open);
  image.addEventListener("keydown", event => { if (event.key === "Enter") open(); });
}
dialog.addEventListener("click", () => dialog.close());
