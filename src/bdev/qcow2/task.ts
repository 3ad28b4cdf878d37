/** Tasks, which are not only the images': see src/bdev/task.ts. */
export * from '../task.js';
