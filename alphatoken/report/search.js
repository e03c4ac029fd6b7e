// Shows the responses that hold a text, without regard to case. Without scripts the page shows all, and no field to search.
const search = document.getElementById("search");
if (search) {
  const articles = [...document.querySelectorAll("article.response")];
  const texts = articles.map(each => (each.querySelector(".text").textContent + " " + each.dataset.where).replaceAll("↵", "").toLowerCase());
  const input = search.querySelector("input");
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    let found = 0;
    articles.forEach((each, index) => {
      each.hidden = !texts[index].includes(wanted);
      found += !each.hidden;
    });
    search.querySelector("output").value = wanted ? `${found} of ${articles.length} responses` : "";
  });
  search.hidden = false;
}
