// A closed vocabulary: the words of a prompt, and their tokens.

/** The words of a prompt that a closed vocabulary knows, as `models.words.only_known`, and those that it ignores. */
export function readWords(prompt, vocabulary) {
  const every = prompt.normalize("NFC").toLowerCase().match(/[\p{L}\p{N}]+|,/gu) ?? [];
  const ignored = every.filter((word) => word !== "," && !vocabulary.includes(word));
  const known = every.filter((word) => vocabulary.includes(word) && !(ignored.length && word === ","));
  return { known, ignored };
}

/** Token ids of known words, (T,): start, words, end, padding. */
export function tokenIds(words, table) {
  const ids = words.flatMap((word) => table.ids[word]).slice(0, table.length - 2);
  const padded = [table.begin, ...ids, table.end];
  return [...padded, ...Array(table.length - padded.length).fill(table.pad)];
}
