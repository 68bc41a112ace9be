import type { Model, Pixels, Transparency } from "../common/types.mjs";

export * from "../common/types.mjs";

/** A file's path or file: URL, a file's bytes, or pixels. */
export type AnyPicture = string | URL | Uint8Array | Pixels;

export type PaliGemma = Model<AnyPicture>;

/** Check a bundle's folder, a path or a file: URL, and open it; `threads` 0, the default, takes every core. Throws PaliGemmaError. */
export function load(folder: string | URL, options?: { threads?: number }): Promise<PaliGemma>;

/** A picture as pixels: upright, without transparency. Throws PaliGemmaError. */
export function decodePicture(picture: AnyPicture, transparency?: Transparency): Promise<Pixels>;
